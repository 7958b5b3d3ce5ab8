"""LoraPipeline on tiny pipelines, which stay stock pipelines."""

from __future__ import annotations

import copy
import json

import diffusers
import pytest
import torch
from lora_adapters_diffusers import LoraPipeline
from lora_adapters_diffusers.loading import _kind_of
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from torch import nn

import lora_adapters as la
from lora_adapters.errors import CheckpointError, RequestError, StateError, UnsupportedError

KINDS = ("sd", "sdxl", "flux", "sd3")


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


def test_a_loaded_adapter_drops_nothing_out(tiny, tmp_path):
    """New layers begin in training mode; a pipeline in evaluation mode must not draw images with their dropout."""
    lora = tiny.trained("sd", dropout=0.5)
    lora.save(tmp_path)
    loaded = LoraPipeline(tiny.build("sd"))
    loaded.load(tmp_path)
    assert not any(module.training for part in loaded.components.values() for module in part.modules())
    tiny.close(tiny.image(loaded.pipe), tiny.image(loaded.pipe), limit=1e-7)


def test_diffusers_sees_what_attach_made(tiny):
    lora = tiny.trained("sd")
    pipe = lora.pipe
    assert pipe.get_list_adapters() == {"unet": ["default"], "text_encoder": ["default"]}
    assert pipe.get_active_adapters() == ["default"]
    assert lora.adapters == {"unet": ["default"], "text_encoder": ["default"]}
    on = tiny.image(pipe)
    pipe.disable_lora()
    off = tiny.image(pipe)
    tiny.close(off, tiny.image(tiny.build("sd")), 1e-6)
    pipe.enable_lora()
    assert torch.equal(tiny.image(pipe), on)
    pipe.set_adapters("default", 0.0)
    tiny.close(tiny.image(pipe), off, 1e-6)
    pipe.set_adapters("default", 1.0)
    pipe.fuse_lora(components=["unet", "text_encoder"])
    tiny.close(tiny.image(pipe), on)
    assert pipe.fused_loras == {"default"}
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    assert torch.equal(tiny.image(pipe), on)
    pipe.unload_lora_weights()
    tiny.close(tiny.image(pipe), off, 1e-6)
    assert lora.adapters == {}
    with pytest.raises(RequestError, match="No adapter 'default'"):
        lora.adapter()
    pipe.fuse_qkv_projections()  # nothing is left that it could lose
    pipe.unfuse_qkv_projections()
    lora.attach(rank=2)  # what other code took off is no hindrance
    with pytest.raises(StateError, match="lost without a word"):
        pipe.fuse_qkv_projections()
    tiny.close(tiny.image(pipe), off, 1e-6)


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


def test_two_adapters_set_fused_and_deleted(tiny, tmp_path):
    a, b = tiny.two(tmp_path)
    lora, stock = LoraPipeline(tiny.build("sd")), tiny.build("sd")
    bare = {n: v.clone() for n, v in lora.denoiser.state_dict().items()}
    for name, folder in {"a": a, "b": b}.items():
        lora.load(folder, adapter_name=name)
        stock.load_lora_weights(folder, adapter_name=name)
    blocks = {"unet": {"down": 0.2, "mid": 0.5, "up": {"block_1": [0.1, 0.9]}}}
    for weights in ({"a": 0.7, "b": 0.3}, {"b": 1.5}, {"a": 1.0, "b": blocks}):
        lora.set(weights)
        stock.set_adapters(list(weights), [json.loads(json.dumps(w)) for w in weights.values()])
        tiny.close(tiny.image(lora.pipe), tiny.image(stock))
    assert blocks["unet"]["down"] == 0.2
    active = tiny.image(lora.pipe)
    lora.fuse()
    tiny.close(tiny.image(lora.pipe), active)
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
    tiny.close(tiny.image(lora.pipe), tiny.image(stock))


def test_adapters_of_stock_code_are_managed_too(tiny, tmp_path):
    a, b = tiny.two(tmp_path)
    lora = LoraPipeline(tiny.build("sd"))
    lora.pipe.load_lora_weights(a, adapter_name="a")
    stock = tiny.image(lora.pipe)
    reports = lora.optimize()
    assert reports["unet"].counts.keys() == {"split"}
    tiny.close(tiny.image(lora.pipe), stock)
    lora.fuse()
    lora.unfuse()
    tiny.close(tiny.image(lora.pipe), stock, 1e-6)
    made = lora.attach(rank=2, adapter_name="mine")
    assert lora.adapters == {"unet": ["a", "mine"]}
    assert lora.pipe.get_list_adapters() == {"unet": ["a", "mine"]}
    assert lora.pipe.get_active_adapters() == ["mine"]
    assert {n.split(".")[-2] for n, p in lora.denoiser.named_parameters() if p.requires_grad} == {"mine"}
    lora.set({"a": 1.0, "mine": 1.0})
    tiny.close(tiny.image(lora.pipe), stock)
    made["unet"].detach()
    lora.set("a")
    tiny.close(tiny.image(lora.pipe), stock)
    lora.pipe.load_lora_weights(b, adapter_name="b")
    lora.delete("a")
    assert lora.adapters == {"unet": ["b"]}
    lora.delete("b")
    tiny.close(tiny.image(lora.pipe), tiny.image(tiny.build("sd")), 1e-6)


def test_hotswap(tiny, tmp_path):
    a, b = tiny.two(tmp_path)
    for first, second in ((a, b), (b, a)):
        lora, other = LoraPipeline(tiny.build("sd")), LoraPipeline(tiny.build("sd"))
        lora.load(first, adapter_name="it")
        layers = [m for m in lora.denoiser.modules() if isinstance(m, LoraLayer)]
        lora.hotswap(second, adapter_name="it")
        other.load(second, adapter_name="it")
        assert layers == [m for m in lora.denoiser.modules() if isinstance(m, LoraLayer)]
        tiny.close(tiny.image(lora.pipe), tiny.image(other.pipe))
        lora.set({"it": 0.5})
        other.set({"it": 0.5})
        tiny.close(tiny.image(lora.pipe), tiny.image(other.pipe))
        plan = lora.adapter(adapter_name="it").plan
        assert {layer.scaling for layer in plan.layers} == {2.0 if second == a else 1.0}
        lora.save(tmp_path / "again", adapter_name="it")
        fresh = tiny.build("sd")
        fresh.load_lora_weights(tmp_path / "again", adapter_name="it")
        fresh.set_adapters("it", 0.5)
        tiny.close(tiny.image(fresh), tiny.image(other.pipe))


def test_hotswap_of_text_encoders_and_prepared_models(tiny, tmp_path):
    tiny.trained("sd").save(tmp_path / "small")
    tiny.trained("sd", rank=8).save(tmp_path / "large")
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
    tiny.close(tiny.image(plain.pipe), expected)
    unet_only = LoraPipeline(tiny.build("sd"))
    unet_only.attach(rank=2)
    with pytest.raises(CheckpointError, match="delete the old one"):
        unet_only.hotswap(tmp_path / "small")


def test_compiled_models(tiny, tmp_path):
    """diffusers' set_adapters passes over torch.compile's wrappers; ours reaches the model inside."""
    a, b = tiny.two(tmp_path)
    expected = []
    for compiled in (False, True):
        lora = LoraPipeline(tiny.build("sd"))
        lora.load(a, adapter_name="a")
        if compiled:
            lora.pipe.unet = torch.compile(lora.pipe.unet, backend="eager")
        wrapper = lora.pipe.unet
        lora.load(b, adapter_name="b")
        lora.set({"a": 0.5, "b": 2.0})
        expected.append(tiny.image(lora.pipe))
        lora.fuse()
        expected.append(tiny.image(lora.pipe))
        lora.unfuse()
        lora.save(tmp_path / str(compiled), "b")
        lora.delete("b")
        expected.append(tiny.image(lora.pipe))
        assert lora.pipe.unet is wrapper
    for plain, compiled in zip(expected[:3], expected[3:], strict=True):
        tiny.close(compiled, plain, 1e-5)
    assert tiny.differs(expected[0], expected[2])


def test_offloaded_models(tiny, tmp_path):
    """Hooks of group offloading, which runs on a CPU too, come off while layers change, and are back afterwards."""
    a, _ = tiny.two(tmp_path)
    lora, plain = LoraPipeline(tiny.build("sd")), LoraPipeline(tiny.build("sd"))
    lora.denoiser.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    for each in (lora, plain):
        each.load(a, adapter_name="a")
    tiny.close(tiny.image(lora.pipe), tiny.image(plain.pipe), 1e-6)
    for each in (lora, plain):
        each.attach(rank=2, adapter_name="mine", init_lora_weights=False, seed=3)
    tiny.close(tiny.image(lora.pipe), tiny.image(plain.pipe), 1e-6)
    lora.delete("mine")
    lora.set("a")
    plain.set("a")
    tiny.close(tiny.image(lora.pipe), tiny.image(plain.pipe), 1e-6)
    assert any(hasattr(m, "_diffusers_hook") for m in lora.denoiser.modules())


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_four_bits_on_the_cpu(tiny, kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    name = tiny.denoiser_name(tiny.build(kind))
    lora = LoraPipeline(tiny.build(kind), quantization={name: "nf4", "text_encoder": "nf4"})
    dense = tiny.image(tiny.build(kind))
    packed = tiny.image(lora.pipe)
    assert not torch.equal(packed, dense)
    tiny.close(packed, dense, 0.2)
    made = lora.attach(rank=2, targets="attention+conv" if kind == "sd" else "attention", components=[name])
    assert {layer.format for layer in made[name].plan.layers} == {"nf4"}
    tiny.close(tiny.image(lora.pipe), packed, 1e-5)
    tiny.fill(lora.denoiser)
    on = tiny.image(lora.pipe)
    lora.fuse()
    tiny.close(tiny.image(lora.pipe), on, 1e-3)
    lora.unfuse()
    assert torch.equal(tiny.image(lora.pipe), on)
    lora.save(tmp_path)
    again = LoraPipeline(tiny.build(kind), quantization={name: "nf4", "text_encoder": "nf4"})
    again.load(tmp_path)
    tiny.close(tiny.image(again.pipe), on, 1e-6)
    assert not any(type(m).__name__.endswith("4bit") for m in lora.pipe.vae.modules())


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


def test_a_copy_of_an_adapted_model_stands_by_itself(tiny):
    lora = LoraPipeline(tiny.build("sd"))
    lora.attach(rank=2, init_lora_weights=False)
    twin = copy.deepcopy(lora.denoiser)
    with pytest.raises(StateError, match="lost without a word"):
        twin.fuse_qkv_projections()
    lora.pipe.unload_lora_weights()
    with pytest.raises(StateError, match="lost without a word"):
        twin.fuse_qkv_projections()
    lora.pipe.fuse_qkv_projections()


def test_a_pipeline_that_diffusers_gives_no_lora():
    pipe = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        ),
        diffusers.DDPMScheduler(),
    )
    with pytest.raises(UnsupportedError, match="no LoRA methods"):
        LoraPipeline(pipe)


KINDS_OF_FILES = {
    "StableDiffusionPipeline": {"model.diffusion_model.output_blocks.11.0.skip_connection.weight": (1, 1)},
    "StableDiffusionXLPipeline": {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,)},
    "FluxPipeline": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,), "img_in.weight": (3072, 64)},
}


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_which_pipeline_a_single_file_is_for(kind, tmp_path):
    tensors = {key: torch.zeros(shape) for key, shape in KINDS_OF_FILES[kind].items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert _kind_of(tmp_path / "model.safetensors") == kind
    with pytest.raises(RequestError, match="give pipeline="):
        _kind_of(tmp_path / "model.ckpt")
