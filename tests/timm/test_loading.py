"""lora_adapters.load, skeleton and merge_checkpoint on timm's models, by name, folder and file."""

import json

import pytest
import timm
import torch
from lora_adapters_timm import TimmLoraModel, loading
from lora_adapters_timm.backend import TimmBackend
from safetensors.torch import load_file, save_file
from timm_models import RESNET, VIT, images, lora, plain, trained

import lora_adapters as la
from lora_adapters import preflight
from lora_adapters.api import skeleton
from lora_adapters.errors import CheckpointError, DoesNotFitError, LoraAdaptersError, RequestError
from lora_adapters.weights import quantized_format

HOW = {"backend": "timm", "device": "cpu"}


@pytest.fixture
def folder(tmp_path):
    """A model as timm writes it for the Hub."""
    timm.models.save_for_hf(plain(), tmp_path / "base", safe_serialization=True)
    return tmp_path / "base"


@pytest.fixture
def file(tmp_path):
    save_file(plain().state_dict(), tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def test_random_weights_are_asked_for():
    torch.manual_seed(0)
    model = la.load(VIT[0], pretrained=False, num_classes=5, **HOW, **VIT[1]).eval()
    assert torch.equal(model(images()), plain()(images()))
    assert set(loading.new_weights(model)) == {name for name, _ in model.named_parameters()}
    with pytest.raises(LoraAdaptersError, match=r"can't be had.*checkpoint=.*pretrained=False"):
        la.load("test_resnet", **HOW)


def test_a_folder_has_its_weights(folder):
    assert torch.equal(la.load(str(folder), **HOW).eval()(images()), plain()(images()))
    model = la.load(str(folder), num_classes=3, dtype="bfloat16", **HOW)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert loading.new_weights(model) == ("head.weight", "head.bias")
    assert torch.equal(model.norm.weight, plain().norm.weight.bfloat16())


def test_a_file_has_its_weights(file):
    options = {"num_classes": 5, **VIT[1]}
    for model in (
        la.load(file, architecture=VIT[0], **options, **HOW),
        la.load(VIT[0], checkpoint=file, **options, **HOW),
    ):
        assert torch.equal(model.eval()(images()), plain()(images()))
        assert loading.new_weights(model) == ()
    fewer = la.load(VIT[0], checkpoint=file, **{**options, "num_classes": 3}, **HOW)
    assert torch.equal(fewer.patch_embed.proj.weight, plain().patch_embed.proj.weight)
    assert loading.new_weights(fewer) == ("head.weight", "head.bias")
    with pytest.raises(RequestError, match="architecture="):
        la.load(file, **HOW)
    with pytest.raises(LoraAdaptersError, match="can't be had"):
        la.load("test_resnet", checkpoint=file, **HOW)


@pytest.mark.parametrize("which", [VIT, RESNET], ids=lambda w: w[0])
def test_4_bits_are_what_attach_makes(which):
    pytest.importorskip("bitsandbytes")
    name, arguments = which
    torch.manual_seed(0)
    model = la.load(name, pretrained=False, num_classes=5, quantization="nf4", **HOW, **arguments).eval()
    assert quantized_format(model) == "nf4"
    with lora(which, quantization="nf4").adapter.disabled() as expected:
        torch.testing.assert_close(model(images(which)), expected(images(which)))
    plan = la.plan(skeleton(name, backend="timm", num_classes=5, **arguments), rank=2, quantization="nf4")
    torch.manual_seed(0)
    planned = la.load(name, pretrained=False, num_classes=5, plan=plan, **HOW, **arguments).eval()
    assert torch.equal(planned(images(which)), model(images(which)))
    with pytest.raises(RequestError, match="leave quantization out"):
        la.load(name, plan=plan, quantization="nf4", **HOW)


def test_a_skeleton_reads_no_weight(folder):
    model = skeleton(str(folder), backend="timm", dtype="bfloat16")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    meta, real = la.plan(model, rank=2), la.plan(plain(), rank=2)
    assert [(x.name, x.rank, x.shape) for x in meta.layers] == [(x.name, x.rank, x.shape) for x in real.layers]


def test_what_does_not_fit_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(preflight, "free_memory", lambda device: 1000)
    monkeypatch.setattr(loading, "create", None)
    with pytest.raises(DoesNotFitError):
        la.load("test_resnet", pretrained=False, **HOW)


def test_names_that_it_can_load(folder, tmp_path):
    backend = TimmBackend()
    assert backend.can_load("resnet50.a1_in1k")
    assert backend.can_load(str(folder))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for name in ("no_such_model", "resnet50.no_such_tag", str(tmp_path / "other"), "org/name", str(tmp_path)):
        assert not backend.can_load(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet500", {}, "Did you mean 'resnet50"),
        ("test_resnet", {"no_such": 1}, "does not take an argument"),
        ("test_resnet", {"dtype": "int8"}, "no floating dtype"),
        ("test_resnet", {"revision": "main"}, "Only models of the Hub"),
    ],
)
def test_bad_arguments(name, options, message):
    with pytest.raises(RequestError, match=message):
        la.load(name, pretrained=False, **HOW, **options)


def test_progress_bars_are_put_back():
    from huggingface_hub.utils import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    with loading.progress_bars(False):
        assert are_progress_bars_disabled()
    assert are_progress_bars_disabled() == before


# ---- merge_checkpoint ----------------------------------------------------------------------------------------------------


def test_merging_into_the_base_that_the_adapter_names(folder, tmp_path):
    model = trained(TimmLoraModel(str(folder), num_classes=3, rank=2).eval())
    adapter = model.save(tmp_path / "adapter")
    made = la.merge_checkpoint(None, adapter, tmp_path / "merged", backend="timm")
    assert (made.base, made.base_from, made.model) == (str(folder), "adapter", "VisionTransformer")
    assert made.trained == ("head",)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images()), model(images()), rtol=1e-4, atol=1e-5)
    by_name = timm.create_model(
        VIT[0], num_classes=3, checkpoint_path=tmp_path / "merged" / "model.safetensors", **VIT[1]
    ).eval()
    assert torch.equal(by_name(images()), loaded(images()))
    ours = load_file(model.save_merged(tmp_path / "ours") / "model.safetensors")
    theirs = load_file(tmp_path / "merged" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_merging_into_a_file_of_weights(file, tmp_path):
    model = trained(TimmLoraModel(plain(), rank=2).eval())
    adapter = model.save(tmp_path / "adapter")
    la.merge_checkpoint(file, adapter, tmp_path / "merged", backend="timm")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_merging_a_frozen_head_needs_one_in_the_base(folder, tmp_path):
    model = trained(TimmLoraModel(str(folder), num_classes=3, train_head=False, rank=2))
    adapter = model.save(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"has no 'head\.weight'"):
        la.merge_checkpoint(str(folder), adapter, tmp_path / "merged", backend="timm")
    assert not (tmp_path / "merged").exists()


def test_merging_into_another_architecture(folder, tmp_path):
    adapter = lora(RESNET).save(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"trained on a test_resnet, and .* is a vit_tiny"):
        la.merge_checkpoint(str(folder), adapter, tmp_path / "merged", backend="timm")
