"""transformers' TimmWrapper models: the classifier is trained whole and stays dense, everything else is as in timm."""

import pytest
import timm
import torch
from helpers import assert_same, perturb, state
from lora_adapters_timm.wrapped import TimmWrapperBackend
from lora_adapters_transformers import LoraCallback
from peft import PeftModel
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments

import lora_adapters as la
from lora_adapters.testing import BackendContract

VIT = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)


def wrapped(architecture="vit_tiny_patch16_224", seed=0, **arguments):
    torch.manual_seed(seed)
    arguments = arguments or (VIT if architecture.startswith("vit") else {})
    config = TimmWrapperConfig(architecture=architecture, num_labels=3, model_args=arguments)
    config.id2label = {0: "cat", 1: "dog", 2: "owl"}
    return TimmWrapperForImageClassification(config)


class TestContract(BackendContract):
    def make_backend(self):
        return TimmWrapperBackend()

    def make_model(self):
        return wrapped()


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "test_resnet"])
def test_the_classifier_is_neither_quantized_nor_wrapped(architecture):
    model = wrapped(architecture)
    plan = la.plan(model, rank=2, quantization="nf4")
    assert plan.backend == "timm-wrapper"
    (head,) = plan.trained
    assert head.startswith("timm_model.")
    assert head not in plan.quantize
    assert not [layer.name for layer in plan.layers if layer.name.startswith(head)]
    assert plan.quantize
    assert all(name.startswith("timm_model.") for name in plan.quantize)


def test_parts_of_the_fused_projection():
    plan = la.plan(wrapped(), targets={"q": 2, "v": 3})
    assert {layer.rank for layer in plan.layers} == {5}
    assert [part.role for part in plan.layers[0].parts] == ["q", "v"]


def test_trainer_saves_what_stock_peft_and_we_load(tmp_path):
    lora = LoraCallback(wrapped(), rank=2, quantization="nf4")
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=3,
        report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    Trainer(model=lora.model, args=args, train_dataset=rows, callbacks=[lora]).train()
    images = torch.randn(2, 3, 32, 32)
    lora.model.eval()
    with torch.no_grad():
        expected = lora.model(pixel_values=images).logits
    for load in (la.restore, PeftModel.from_pretrained):
        base = wrapped()
        la.attach(base, rank=1, quantization="nf4").detach()
        load(base, tmp_path / "checkpoint-3")
        with torch.no_grad():
            torch.testing.assert_close(base.eval()(pixel_values=images).logits, expected)


def test_labels_are_saved_and_detach_gives_the_bits_back(tmp_path):
    from lora_adapters.checkpoint import inspect_adapter

    model = wrapped()
    before = state(model)
    adapter = la.attach(model, rank=2)
    perturb(adapter.model)
    folder = adapter.save(tmp_path / "adapter")
    assert "owl" in str(inspect_adapter(folder).metadata)
    adapter.detach()
    assert_same(model, before)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "test_resnet"])
def test_timm_loads_the_merged_model_inside(architecture, tmp_path):
    model = wrapped(architecture)
    adapter = la.attach(model, rank=2)
    perturb(adapter.model)
    size = 32 if architecture.startswith("vit") else 64
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.eval()(pixel_values=images).logits
    adapter.merge(unload=True)
    # transformers keeps its prefix in the keys, which timm refuses; the model inside is timm's own and writes its own.
    timm.models.save_for_hf(model.timm_model, tmp_path / "merged", safe_serialization=True)
    file = tmp_path / "merged" / "model.safetensors"
    arguments = model.config.model_args or {}
    loaded = timm.create_model(architecture, num_classes=3, checkpoint_path=file, **arguments).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "transformers")
    again = TimmWrapperForImageClassification.from_pretrained(tmp_path / "transformers").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(pixel_values=images).logits, expected, rtol=1e-4, atol=1e-4)
