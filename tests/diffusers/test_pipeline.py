"""LoraPipeline on tiny pipelines: what it makes, saves and loads is what stock diffusers sees, and gives the same image."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import diffusers
import pytest
import torch
from lora_adapters_diffusers import LoraPipeline
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

import lora_adapters as la
from lora_adapters.errors import CheckpointError, RequestError, StateError, UnsupportedError

KINDS = ("sd", "sdxl", "flux", "sd3")
ENCODERS = {
    "sd": ["text_encoder"],
    "sdxl": ["text_encoder", "text_encoder_2"],
    "flux": ["text_encoder"],
    "sd3": ["text_encoder", "text_encoder_2"],
}


@pytest.fixture(scope="module")
def tiny():
    """The module that builds tiny pipelines, importable while this file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield importlib.import_module("pipelines")


def fill(model, seed=0, size=0.3):
    """Give every B a random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def close(ours, theirs, limit=1e-4):
    difference = (ours - theirs).abs().max().item()
    assert difference < limit, difference


def differs(one, other):
    return (one - other).abs().max().item() > 1e-3


def denoiser_name(pipe):
    return "unet" if "unet" in pipe.components else "transformer"


def trained(tiny, kind, **options):
    """Return a LoraPipeline with an adapter on the denoiser and on CLIP, with values."""
    lora = LoraPipeline(tiny.build(kind))
    lora.attach(components=[denoiser_name(lora.pipe), *ENCODERS[kind]], **{"rank": 4, **options})
    for seed, name in enumerate(lora.adapters):
        fill(lora.components[name], seed)
    return lora


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_in_a_stock_pipeline_with_the_same_image(tiny, kind, tmp_path):
    lora = trained(tiny, kind, alpha=9)
    ours = tiny.image(lora.pipe)
    file = lora.save(tmp_path)
    assert file == tmp_path / "pytorch_lora_weights.safetensors"
    stock = tiny.build(kind)
    assert differs(ours, tiny.image(stock))
    stock.load_lora_weights(tmp_path)
    close(tiny.image(stock), ours)
    fresh = LoraPipeline(tiny.build(kind))
    made = fresh.load(tmp_path)
    assert set(made) == {denoiser_name(stock), *ENCODERS[kind]}
    close(tiny.image(fresh.pipe), ours, 1e-6)


@pytest.mark.parametrize(
    "options", [dict(alpha=2, use_rslora=True), dict(targets={"attention": 4, "conv": 2}, alpha=3)]
)
def test_every_scale_is_kept(tiny, tmp_path, options):
    lora = LoraPipeline(tiny.build("sd"))
    lora.attach(rank=4, **options)
    fill(lora.denoiser)
    ours = tiny.image(lora.pipe)
    lora.set({"default": 0.5})  # a weight is no part of what is saved
    lora.save(tmp_path / "mine.safetensors")
    stock = tiny.build("sd")
    stock.load_lora_weights(tmp_path, weight_name="mine.safetensors")
    close(tiny.image(stock), ours)


def test_three_training_steps(tiny):
    torch.manual_seed(0)
    lora = LoraPipeline(tiny.build("sd"))
    adapter = lora.attach(rank=4, targets={"attention": 4, "conv": 2})["unet"]
    before = {n: p.clone() for n, p in lora.denoiser.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    sample, text, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32), torch.randn(2, 4, 8, 8)
    losses = []
    for _ in range(3):
        loss = (lora.denoiser(sample, 300, encoder_hidden_states=text).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    changed = {n for n, p in lora.denoiser.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".lora_" in n}


@pytest.mark.parametrize("kind", KINDS)
def test_stock_adapters_give_the_same_image_here(tiny, kind, tmp_path):
    stock = tiny.build(kind)
    name = denoiser_name(stock)
    model = getattr(stock, name)
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    fill(model)
    metadata = {f"{name}_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    state = {f"{name}_lora_layers": get_peft_model_state_dict(model)}
    stock.save_lora_weights(tmp_path, **state, **metadata)
    lora = LoraPipeline(tiny.build(kind))
    lora.load(tmp_path, adapter_name="theirs")
    close(tiny.image(lora.pipe), tiny.image(stock))
    scaled = lora.denoiser.peft_config["theirs"]
    assert (scaled.r, scaled.lora_alpha) == (3, 6)


def test_diffusers_sees_what_attach_made(tiny):
    lora = trained(tiny, "sd")
    pipe = lora.pipe
    assert pipe.get_list_adapters() == {"unet": ["default"], "text_encoder": ["default"]}
    assert pipe.get_active_adapters() == ["default"]
    assert lora.adapters == {"unet": ["default"], "text_encoder": ["default"]}
    on = tiny.image(pipe)
    pipe.disable_lora()
    off = tiny.image(pipe)
    close(off, tiny.image(tiny.build("sd")), 1e-6)
    pipe.enable_lora()
    assert torch.equal(tiny.image(pipe), on)
    pipe.set_adapters("default", 0.0)
    close(tiny.image(pipe), off, 1e-6)
    pipe.set_adapters("default", 1.0)
    pipe.fuse_lora(components=["unet", "text_encoder"])
    close(tiny.image(pipe), on)
    assert pipe.fused_loras == {"default"}
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    assert torch.equal(tiny.image(pipe), on)
    pipe.unload_lora_weights()
    close(tiny.image(pipe), off, 1e-6)
    assert lora.adapters == {}
    with pytest.raises(RequestError, match="No adapter 'default'"):
        lora.adapter()
    lora.attach(rank=2)  # what other code took off is no hindrance
    close(tiny.image(pipe), off, 1e-6)


def test_detach_takes_back_what_diffusers_saw(tiny):
    lora = LoraPipeline(tiny.build("sd"))
    before = {name: (dict(vars(m)), list(m.state_dict())) for name, m in lora.components.items()}
    made = lora.attach(rank=2, components=["unet", "text_encoder"])
    for adapter in made.values():
        adapter.detach()
    for name, module in lora.components.items():
        assert vars(module).keys() == before[name][0].keys()
        assert list(module.state_dict()) == before[name][1]
    assert lora.pipe.get_list_adapters() == {}
    lora.attach(rank=2, components=["unet", "text_encoder"])


def test_attach_is_all_or_none(tiny):
    lora = LoraPipeline(tiny.build("sd"))
    with pytest.raises(la.errors.NoTargetError):
        lora.attach(rank=2, targets="conv", components=["unet", "text_encoder"])
    assert lora.adapters == {}
    with pytest.raises(RequestError, match="no part 'vae'"):
        lora.attach(components=["vae"])


def two(tiny, tmp_path, kind="sd"):
    """Save adapters "a" and "b" as files."""
    for seed, (name, options) in enumerate({"a": dict(alpha=8), "b": dict(rank=2)}.items()):
        lora = LoraPipeline(tiny.build(kind))
        lora.attach(**{"rank": 4, **options})
        fill(lora.denoiser, seed)
        lora.save(tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def test_two_adapters_set_fused_and_deleted(tiny, tmp_path):
    a, b = two(tiny, tmp_path)
    lora, stock = LoraPipeline(tiny.build("sd")), tiny.build("sd")
    bare = {n: v.clone() for n, v in lora.denoiser.state_dict().items()}
    for name, folder in {"a": a, "b": b}.items():
        lora.load(folder, adapter_name=name)
        stock.load_lora_weights(folder, adapter_name=name)
    blocks = {"unet": {"down": 0.2, "mid": 0.5, "up": {"block_1": [0.1, 0.9]}}}
    for weights in ({"a": 0.7, "b": 0.3}, {"b": 1.5}, {"a": 1.0, "b": blocks}):
        lora.set(weights)
        stock.set_adapters(list(weights), [json.loads(json.dumps(w)) for w in weights.values()])
        close(tiny.image(lora.pipe), tiny.image(stock))
    assert blocks["unet"]["down"] == 0.2
    active = tiny.image(lora.pipe)
    lora.fuse()
    close(tiny.image(lora.pipe), active)
    for wrong in (lora.fuse, lambda: lora.set({"a": 1.0}), lambda: lora.delete("a"), lambda: lora.save(tmp_path, "a")):
        with pytest.raises(StateError, match=r"unfuse|fused"):
            wrong()
    lora.unfuse()
    assert torch.equal(tiny.image(lora.pipe), active)
    lora.delete("b")
    assert lora.pipe.get_list_adapters() == {"unet": ["a"]}
    lora.set("a")
    lora.delete("a")
    assert lora.adapters == {}
    assert not any(isinstance(m, LoraLayer) for m in lora.denoiser.modules())
    assert all(torch.equal(value, bare[n]) for n, value in lora.denoiser.state_dict().items())
    lora.load(b, adapter_name="b")
    stock.delete_adapters("a")
    stock.set_adapters("b")
    close(tiny.image(lora.pipe), tiny.image(stock))


def test_adapters_of_stock_code_are_managed_too(tiny, tmp_path):
    a, b = two(tiny, tmp_path)
    lora = LoraPipeline(tiny.build("sd"))
    lora.pipe.load_lora_weights(a, adapter_name="a")
    stock = tiny.image(lora.pipe)
    reports = lora.optimize()
    assert reports["unet"].counts.keys() == {"split"}
    close(tiny.image(lora.pipe), stock)
    lora.fuse()
    lora.unfuse()
    close(tiny.image(lora.pipe), stock, 1e-6)
    made = lora.attach(rank=2, adapter_name="mine")
    assert lora.adapters == {"unet": ["a", "mine"]}
    assert lora.pipe.get_list_adapters() == {"unet": ["a", "mine"]}
    assert lora.pipe.get_active_adapters() == ["mine"]
    assert {n.split(".")[-2] for n, p in lora.denoiser.named_parameters() if p.requires_grad} == {"mine"}
    lora.set({"a": 1.0, "mine": 1.0})
    close(tiny.image(lora.pipe), stock)
    made["unet"].detach()
    lora.set("a")
    close(tiny.image(lora.pipe), stock)
    lora.pipe.load_lora_weights(b, adapter_name="b")
    lora.delete("a")
    assert lora.adapters == {"unet": ["b"]}
    lora.delete("b")
    close(tiny.image(lora.pipe), tiny.image(tiny.build("sd")), 1e-6)


def test_hotswap(tiny, tmp_path):
    a, b = two(tiny, tmp_path)
    for first, second in ((a, b), (b, a)):
        lora, other = LoraPipeline(tiny.build("sd")), LoraPipeline(tiny.build("sd"))
        lora.load(first, adapter_name="it")
        layers = [m for m in lora.denoiser.modules() if isinstance(m, LoraLayer)]
        lora.hotswap(second, adapter_name="it")
        other.load(second, adapter_name="it")
        assert layers == [m for m in lora.denoiser.modules() if isinstance(m, LoraLayer)]
        close(tiny.image(lora.pipe), tiny.image(other.pipe))
        lora.set({"it": 0.5})
        other.set({"it": 0.5})
        close(tiny.image(lora.pipe), tiny.image(other.pipe))
        lora.save(tmp_path / "again", adapter_name="it")
        fresh = tiny.build("sd")
        fresh.load_lora_weights(tmp_path / "again", adapter_name="it")
        fresh.set_adapters("it", 0.5)
        close(tiny.image(fresh), tiny.image(other.pipe))


def test_hotswap_of_text_encoders_and_prepared_models(tiny, tmp_path):
    trained(tiny, "sd").save(tmp_path / "small")
    trained(tiny, "sd", rank=8).save(tmp_path / "large")
    lora = LoraPipeline(tiny.build("sd"))
    lora.pipe.enable_lora_hotswap(target_rank=4)
    lora.load(tmp_path / "small")
    expected = tiny.image(lora.pipe)
    with pytest.raises(CheckpointError, match="enable_lora_hotswap"):
        lora.hotswap(tmp_path / "large")
    assert torch.equal(tiny.image(lora.pipe), expected)
    plain = LoraPipeline(tiny.build("sd"))
    plain.load(tmp_path / "large")
    plain.hotswap(tmp_path / "small")
    close(tiny.image(plain.pipe), expected)
    unet_only = LoraPipeline(tiny.build("sd"))
    unet_only.attach(rank=2)
    with pytest.raises(CheckpointError, match="delete the old one"):
        unet_only.hotswap(tmp_path / "small")


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_four_bits_on_the_cpu(tiny, kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    name = denoiser_name(tiny.build(kind))
    lora = LoraPipeline(tiny.build(kind), quantization={name: "nf4", "text_encoder": "nf4"})
    dense = tiny.image(tiny.build(kind))
    packed = tiny.image(lora.pipe)
    assert not torch.equal(packed, dense)
    close(packed, dense, 0.2)
    made = lora.attach(rank=2, targets="attention+conv" if kind == "sd" else "attention", components=[name])
    assert {layer.format for layer in made[name].plan.layers} == {"nf4"}
    close(tiny.image(lora.pipe), packed, 1e-5)
    fill(lora.denoiser)
    on = tiny.image(lora.pipe)
    lora.fuse()
    close(tiny.image(lora.pipe), on, 1e-3)
    lora.unfuse()
    assert torch.equal(tiny.image(lora.pipe), on)
    lora.save(tmp_path)
    again = LoraPipeline(tiny.build(kind), quantization={name: "nf4", "text_encoder": "nf4"})
    again.load(tmp_path)
    close(tiny.image(again.pipe), on, 1e-6)
    assert not any(type(m).__name__.endswith("4bit") for m in lora.pipe.vae.modules())


# ---- failures that stock diffusers does not report -----------------------------------------------------------------


def test_silent_failure_1_alpha_without_metadata(tiny, tmp_path):
    """Stock diffusers saves no metadata unless told, and loads alpha = rank; the file of ours has it."""
    lora = LoraPipeline(tiny.build("sd"))
    lora.attach(rank=4, alpha=16)
    fill(lora.denoiser)
    wanted = tiny.image(lora.pipe)
    stock = tiny.build("sd")
    layers = get_peft_model_state_dict(lora.denoiser)
    layers = {key.removeprefix("base_model.model."): value for key, value in layers.items()}
    stock.save_lora_weights(tmp_path / "stock", unet_lora_layers=layers)
    stock.load_lora_weights(tmp_path / "stock")
    assert differs(tiny.image(stock), wanted)
    other = tiny.build("sd")
    other.load_lora_weights(lora.save(tmp_path / "ours").parent)
    close(tiny.image(other), wanted)
    with safe_open(tmp_path / "ours" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 16


def test_silent_failure_2_a_peft_folder(tiny, tmp_path):
    """Stock diffusers loads nothing of a PEFT folder, with a warning only."""
    lora = trained(tiny, "sd")
    lora.save(tmp_path, format="peft")
    stock = tiny.build("sd")
    bare = tiny.image(stock)
    stock.load_lora_weights(tmp_path / "unet", weight_name="adapter_model.safetensors")
    assert torch.equal(tiny.image(stock), bare)
    ours = LoraPipeline(tiny.build("sd"))
    assert list(ours.load(tmp_path / "unet")) == ["unet"]
    assert list(ours.load(tmp_path / "text_encoder")) == ["text_encoder"]
    close(tiny.image(ours.pipe), tiny.image(lora.pipe), 1e-6)


def test_the_level_text_model_of_other_versions_of_transformers(tiny, tmp_path):
    lora = trained(tiny, "sd")
    lora.save(tmp_path / "mine.safetensors")
    with safe_open(tmp_path / "mine.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    old = {key.replace("text_encoder.encoder.", "text_encoder.text_model.encoder."): v for key, v in tensors.items()}
    assert old.keys() != tensors.keys()
    ours = LoraPipeline(tiny.build("sd"))
    ours.load(old)
    close(tiny.image(ours.pipe), tiny.image(lora.pipe), 1e-6)


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_files_that_do_not_fit(tiny, tmp_path):
    trained(tiny, "sd").save(tmp_path / "sd")
    flux = LoraPipeline(tiny.build("flux"))
    with pytest.raises(CheckpointError, match="another pipeline"):
        flux.load(tmp_path / "sd")
    lora = LoraPipeline(tiny.build("sd"))
    with pytest.raises(UnsupportedError, match="not in diffusers' format"):
        lora.load({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="no safetensors file"):
        lora.load(tmp_path)
    with pytest.raises(CheckpointError, match="no file or folder"):
        lora.load(tmp_path / "nothing")
    good = torch.zeros(2, 16)
    bad = {"unet.down_blocks.0.nothing.lora_A.weight": good, "unet.down_blocks.0.nothing.lora_B.weight": good.T}
    with pytest.raises(CheckpointError, match="made for another model"):
        lora.load(bad)
    assert lora.adapters == {}
    assert not hasattr(lora.denoiser, "peft_config")


def test_arguments(tiny, tmp_path):
    lora = LoraPipeline(tiny.build("sd"))
    with pytest.raises(RequestError, match="no adapter 'x'"):
        lora.set({"x": 1})
    with pytest.raises(RequestError, match="no adapter to fuse"):
        lora.fuse()
    with pytest.raises(RequestError, match="no adapter yet"):
        lora.optimize()
    lora.attach(rank=2)
    with pytest.raises(RequestError, match="already carries"):
        lora.attach(rank=2)
    with pytest.raises(RequestError, match="number or a mapping"):
        lora.set({"default": "strong"})
    with pytest.raises(RequestError, match="does not take these weights"):
        lora.set({"default": {"unet": {"up": {"block_9": [1, 2, 3]}, "mid": [1, 2]}}})
    with pytest.raises(RequestError, match="format must be"):
        lora.save(tmp_path, format="zip")
    with pytest.raises(RequestError, match=r"call lora_adapters\.attach"):
        LoraPipeline(nn.Linear(2, 2))
    with pytest.raises(RequestError, match="is for loading"):
        LoraPipeline(tiny.build("sd"), torch_dtype=torch.float16)
    with pytest.raises(RequestError, match="no part 'vae'"):
        LoraPipeline(tiny.build("sd"), quantization={"vae": "nf4"})


def test_loading_a_pipeline_from_a_folder(tiny, tmp_path):
    pipe = tiny.build("sdxl")
    pipe.save_pretrained(tmp_path)
    lora = LoraPipeline(tmp_path)
    lora.pipe.set_progress_bar_config(disable=True)
    assert isinstance(lora.pipe, diffusers.StableDiffusionXLPipeline)
    assert list(lora.components) == ["unet", "text_encoder", "text_encoder_2"]
    close(tiny.image(lora.pipe), tiny.image(pipe), 1e-6)


def test_what_diffusers_format_can_not_hold(tiny, tmp_path):
    lora = LoraPipeline(tiny.build("sd"))
    lora.attach(rank=2, modules_to_save=["conv_out"])
    with pytest.raises(UnsupportedError, match="PEFT folder"):
        lora.save(tmp_path)
    assert not list(tmp_path.iterdir())
    lora.save(tmp_path, format="peft")
    assert (tmp_path / "unet" / "adapter_config.json").is_file()
