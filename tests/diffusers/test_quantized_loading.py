"""Models quantized while they are read equal those that are loaded dense and quantized in memory, bit for bit."""

from __future__ import annotations

import importlib
import re

import pytest
import single_files
import torch
from lora_adapters_diffusers import LoraPipeline
from safetensors.torch import load_file, save_file
from torch import nn

import lora_adapters as la
from lora_adapters.errors import CheckpointError, RequestError
from lora_adapters.weights import Nf4, store_for

pytest.importorskip("bitsandbytes")

PARTS = {
    "sd": ["unet", "text_encoder"],
    "sdxl": ["unet", "text_encoder", "text_encoder_2"],
    "flux": ["transformer", "text_encoder", "text_encoder_2"],
    "sd3": ["transformer", "text_encoder", "text_encoder_2", "text_encoder_3"],
}


@pytest.fixture(scope="module")
def dense(tiny):
    """Kind -> a pipeline that nobody changes."""
    return {kind: tiny.build(kind) for kind in PARTS}


@pytest.fixture(scope="module")
def folders(dense, tmp_path_factory):
    """Kind -> the folder of that pipeline, its denoiser in several shards."""
    places = {kind: tmp_path_factory.mktemp(kind) for kind in PARTS}
    for kind, pipe in dense.items():
        pipe.save_pretrained(places[kind], max_shard_size="100KB")
    return places


def packed_in_memory(pipe, quantization="nf4"):
    return LoraPipeline(pipe, quantization=quantization).pipe


def same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value, theirs[key]), key
    assert {n: type(m) for n, m in one.named_modules()} == {n: type(m) for n, m in other.named_modules()}
    flags = ("is_loaded_in_4bit", "is_quantized", "quantization_method")
    assert [getattr(one, name, None) for name in flags] == [getattr(other, name, None) for name in flags]
    assert not any(t.is_meta for t in (*one.parameters(), *one.buffers()))


def packed(module: nn.Module) -> set[str]:
    return {name for name, m in module.named_modules() if type(m).__name__.endswith("4bit")}


@pytest.mark.parametrize("kind", PARTS)
def test_from_a_folder(tiny, dense, folders, kind):
    lora = LoraPipeline(folders[kind], quantization="nf4")
    wanted = packed_in_memory(tiny.build(kind))
    for part in PARTS[kind]:
        same(getattr(lora.pipe, part), getattr(wanted, part))
        assert packed(getattr(lora.pipe, part))
    assert not packed(lora.pipe.vae)
    lora.pipe.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.image(lora.pipe), tiny.image(wanted))
    lora.attach(rank=2)
    tiny.close(tiny.image(lora.pipe), tiny.image(wanted), 1e-5)


def test_dtypes_variants_and_pickles(tiny, folders, tmp_path):
    half = tiny.build("sd").to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    half.unet.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    wanted = packed_in_memory(half)
    lora = LoraPipeline(tmp_path, quantization="nf4", variant="fp16", torch_dtype=torch.float16)
    for part in PARTS["sd"]:
        same(getattr(lora.pipe, part), getattr(wanted, part))
    same(la.load(str(tmp_path / "pickled"), quantization="nf4", dtype="float16", device="cpu"), wanted.unet)
    cast = la.load(str(folders["sd"] / "unet"), quantization="nf4", dtype="float16", device="cpu")
    same(cast, wanted.unet)
    # What stays dense holds no more than itself, and not the file that it was read from.
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in cast.parameters() if type(p) is nn.Parameter)
    cast.save_config(tmp_path / "config")
    assert "quantization" not in (tmp_path / "config" / "config.json").read_text()


def test_one_layer_at_a_time(folders, monkeypatch):
    """When a layer is quantized, no other layer that is to be quantized has dense values."""
    seen = []
    watched: list[nn.Module] = []
    whole = Nf4.quantize

    def spy(self, module, compute_dtype):
        if module.weight.device.type != "meta":
            seen.append(sum(_dense_values(model) for model in watched))
        return whole(self, module, compute_dtype)

    layerwise = importlib.import_module("lora_adapters_diffusers.layerwise")
    begin = layerwise.Layers.__init__

    def note(self, model, quantization):
        begin(self, model, quantization)
        watched[:] = [model]

    monkeypatch.setattr(layerwise.Layers, "__init__", note)
    monkeypatch.setattr(Nf4, "quantize", spy)
    model = la.load(str(folders["sd"] / "unet"), quantization="nf4", device="cpu")
    layers = [store_for(model.get_submodule(name)) for name in packed(model)]
    assert len(seen) == len(layers) > 20
    assert max(seen) <= _dense_values(model) + max(layer.shape.numel() for layer in layers)


def _dense_values(model):
    layers = (m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return sum(w.numel() for w in layers if w.is_floating_point() and not w.is_meta)


#: Text encoders that the tests' files lack: what diffusers looks for in SDXL's is too deep for a tiny one.
GIVEN = {"sd": [], "sdxl": ["text_encoder_2"], "sd3": ["text_encoder", "text_encoder_2", "text_encoder_3"]}
CLASSES = {"sdxl": {"pipeline": "StableDiffusionXLPipeline"}, "sd3": {"pipeline": "StableDiffusion3Pipeline"}}


@pytest.mark.parametrize("kind", GIVEN)
def test_from_a_single_file(tiny, dense, folders, kind, tmp_path):
    file = tmp_path / "model.safetensors"
    single_files.write(dense[kind], file, "sd1" if kind == "sd" else kind)
    options = {"config": str(folders[kind]), **CLASSES.get(kind, {})}
    plain = LoraPipeline(file, **options, **{name: dense[kind].components[name] for name in GIVEN[kind]}).pipe
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.image(plain), tiny.image(dense[kind]))
    given = {name: tiny.build(kind).components[name] for name in GIVEN[kind]}
    lora, wanted = LoraPipeline(file, quantization="nf4", **options, **given), packed_in_memory(tiny.build(kind))
    for part in PARTS[kind]:
        same(getattr(lora.pipe, part), getattr(wanted, part))
    lora.pipe.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.image(lora.pipe), tiny.image(wanted))


def test_parts_dense_by_role(tiny, dense, folders):
    """Attention in 4 bits and convolutions dense, and the reverse."""
    for wanted, role in (({"attention": "nf4"}, "attn"), ({"conv": "nf4"}, "conv")):
        lora = LoraPipeline(folders["sd"], quantization={"unet": wanted})
        same(lora.denoiser, packed_in_memory(tiny.build("sd"), {"unet": wanted}).unet)
        names = packed(lora.denoiser)
        layers = {name for name, m in lora.denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        if role == "attn":
            assert names == {name for name in layers if ".attn" in name}
        else:
            assert names == {n for n in layers if re.search(r"\.(conv\d?|conv_shortcut)$", n)}
        assert not packed(lora.pipe.text_encoder)
        lora.pipe.set_progress_bar_config(disable=True)
        tiny.close(tiny.image(lora.pipe), tiny.image(dense["sd"]), 0.2)


def test_training_through_a_quantized_text_encoder(tiny):
    for kind, encoders in (("sd", ["text_encoder"]), ("sd3", ["text_encoder", "text_encoder_2"])):
        lora = LoraPipeline(tiny.build(kind), quantization="nf4")
        name = tiny.denoiser_name(lora.pipe)
        made = lora.attach(rank=2, components=[name, *encoders], seed=0)
        parameters = [p for adapter in made.values() for p in adapter.parameters()]
        before = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(2):
            _loss(lora, kind).backward()
            optimizer.step()
        for encoder in encoders:
            gradients = [p.grad for n, p in getattr(lora.pipe, encoder).named_parameters() if "lora_B" in n]
            assert any(g is not None and g.abs().max() > 0 for g in gradients), encoder
        assert any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def _loss(lora, kind):
    """One step through the text encoders, T5 included, and the denoiser."""
    torch.manual_seed(0)
    encoded = lora.pipe.encode_prompt(
        **(
            {"prompt": "a cat"}
            | ({"prompt_2": None, "prompt_3": None, "max_sequence_length": 16} if kind == "sd3" else {})
        ),
        **({} if kind == "sd3" else {"device": "cpu", "num_images_per_prompt": 1}),
        do_classifier_free_guidance=False,
    )
    latents = torch.randn(1, 4, 8, 8)
    if kind == "sd3":
        inputs = {"hidden_states": latents, "pooled_projections": encoded[2], "timestep": torch.tensor([300])}
    else:
        inputs = {"sample": latents, "timestep": 300}
    return lora.denoiser(encoder_hidden_states=encoded[0], **inputs).sample.square().mean()


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_files_of_another_model(dense, tmp_path):
    unet = dense["sd"].unet
    whole = tmp_path / "unet"
    unet.save_pretrained(whole)
    file = whole / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    key = "mid_block.resnets.0.conv1.weight"
    for wrong, message in (
        ({k: v for k, v in tensors.items() if k != key}, "lack 1 of"),
        (tensors | {"extra.weight": torch.zeros(2)}, "no place for, first 'extra.weight'"),
        (tensors | {key: torch.zeros(3, 3)}, "different models"),
        (tensors | {key: torch.full_like(tensors[key], float("nan"))}, "not finite"),
    ):
        save_file(wrong, file)
        with pytest.raises((CheckpointError, RequestError), match=message):
            la.load(str(whole), quantization="nf4", device="cpu")


def test_text_encoders_of_another_model(tiny, tmp_path):
    pipe = tiny.build("sd")
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("layers.1.mlp.fc1.weight"))
    for wrong, message in (
        ({k: v for k, v in tensors.items() if k != key}, "lack 1 of"),
        (tensors | {key: torch.full_like(tensors[key], float("inf"))}, "not finite"),
    ):
        save_file(wrong, file, metadata={"format": "pt"})
        with pytest.raises((CheckpointError, RequestError), match=message):
            LoraPipeline(tmp_path, quantization={"text_encoder": "nf4"})


def test_components_that_are_not_quantized(tiny, folders):
    for source in (folders["sd"], tiny.build("sd")):
        for part, message in (("vae", "stay dense"), ("transformer", "no part 'transformer'")):
            with pytest.raises(RequestError, match=message):
                LoraPipeline(source, quantization={part: "nf4"})
    pipe = tiny.build("sd")
    with pytest.raises(RequestError, match="is no role"):
        LoraPipeline(pipe, quantization={"unet": "nf4", "text_encoder": {"convolution": "nf4"}})
    assert not packed(pipe.unet)
    with pytest.raises(RequestError, match="no part 'text_encoder'"):
        LoraPipeline(folders["sd"], quantization={"text_encoder": "nf4"}, text_encoder=None)
    with pytest.raises(RequestError, match="not both"):
        LoraPipeline(folders["sd"], quantization="nf4", quantization_config=object())
