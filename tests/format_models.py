"""Real structures (on the meta device) and tiny pipelines, and adapters with values of their own on them."""

from functools import lru_cache

import torch
from torch import nn

from lora_adapters.formats import LohaFactors, LokrFactors, LoraFactors, PortableAdapter

SD1_BLOCKS = dict(cross_attention_dim=768)
SDXL = dict(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


@lru_cache
def denoiser(family):
    """The released model of a family, with its real names and sizes, without weights."""
    import diffusers

    with torch.device("meta"):
        if family == "sd1":
            return diffusers.UNet2DConditionModel(**SD1_BLOCKS)
        if family == "sd2":
            heads = dict(attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
            return diffusers.UNet2DConditionModel(cross_attention_dim=1024, **heads)
        if family == "sdxl":
            return diffusers.UNet2DConditionModel(**SDXL)
        if family == "sd3":
            return diffusers.SD3Transformer2DModel(
                dual_attention_layers=tuple(range(13)), num_layers=24, num_attention_heads=24
            )
        return diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)


def layers(model):
    """Return name -> weight shape of every linear layer and convolution."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: tuple(module.weight.shape) for name, module in model.named_modules() if isinstance(module, kinds)}


def values(*shape, seed=0, dtype=torch.float32):
    return (0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def lora(shape, rank=4, alpha=None, seed=0, dtype=torch.float32, **more):
    kernel = shape[2:]
    a = values(rank, *shape[1:], seed=seed, dtype=dtype)
    b = values(shape[0], rank, *[1] * len(kernel), seed=seed + 1, dtype=dtype)
    return LoraFactors(a=a, b=b, alpha=float(rank if alpha is None else alpha), **more)


def tucker(shape, rank=3, alpha=2.0, seed=0, dtype=torch.float32):
    ones = [1] * len(shape[2:])
    a, b = (
        values(rank, shape[1], *ones, seed=seed, dtype=dtype),
        values(shape[0], rank, *ones, seed=seed + 1, dtype=dtype),
    )
    return LoraFactors(a=a, b=b, mid=values(rank, rank, *shape[2:], seed=seed + 2, dtype=dtype), alpha=alpha)


def loha(shape, rank=3, alpha=2.0, seed=0, core=False, dtype=torch.float32):
    out, inside, *kernel = shape
    make = lambda index, *sides: values(*sides, seed=seed + index, dtype=dtype)  # noqa: E731
    if core:
        tensors = dict(
            w1_a=make(0, rank, out), w1_b=make(1, rank, inside), w2_a=make(2, rank, out), w2_b=make(3, rank, inside)
        )
        cores = dict(t1=make(4, rank, rank, *kernel), t2=make(5, rank, rank, *kernel))
        return LohaFactors(**tensors, **cores, alpha=alpha)
    flat = inside * torch.Size(kernel).numel()
    tensors = dict(w1_a=make(0, out, rank), w1_b=make(1, rank, flat), w2_a=make(2, out, rank), w2_b=make(3, rank, flat))
    return LohaFactors(**tensors, alpha=alpha, kernel=tuple(kernel))


def lokr(shape, first=(2, 4), rank=3, alpha=2.0, seed=0, w1="whole", w2="product", dtype=torch.float32):
    out, inside, *kernel = shape
    (out1, in1), out2, in2 = first, out // first[0], inside // first[1]
    make = lambda index, *sides: values(*sides, seed=seed + index, dtype=dtype)  # noqa: E731
    one = dict(w1=make(0, out1, in1)) if w1 == "whole" else dict(w1_a=make(0, out1, rank), w1_b=make(1, rank, in1))
    if w2 == "whole":
        two = dict(w2=make(2, out2, in2, *kernel))
    elif w2 == "core":
        two = dict(w2_a=make(2, rank, out2), w2_b=make(3, rank, in2), t2=make(4, rank, rank, *kernel))
    else:
        flat = in2 * torch.Size(kernel).numel()
        two = dict(w2_a=make(2, out2, rank), w2_b=make(3, rank, flat), kernel=tuple(kernel))
    return LokrFactors(**one, **two, alpha=alpha)


def adapter_on(family, names=None, rank=2, alpha=3.0, dtype=torch.float32, text=True):
    """A LoRA adapter of a released model, by default on every layer, and on its text encoders."""
    component = "transformer" if family in ("flux", "sd3") else "unet"
    shapes = {name: shape for name, shape in layers(denoiser(family)).items() if names is None or names(name)}
    components = {
        component: {name: lora(shape, rank, alpha, i, dtype) for i, (name, shape) in enumerate(shapes.items())}
    }
    if text:
        clip = "text_model.encoder.layers.{}.{}"
        widths = dict(sd1=[768], sd2=[1024], sdxl=[768, 1280], sd3=[768, 1280], flux=[768])[family]
        for index, width in enumerate(widths):
            encoder = "text_encoder" + (f"_{index + 1}" if index else "")
            components[encoder] = {
                clip.format(0, "self_attn.q_proj"): lora((width, width), rank, alpha, 1, dtype),
                clip.format(11, "mlp.fc1"): lora((4 * width, width), rank, alpha, 2, dtype),
            }
        if family in ("sd3", "flux"):
            t5 = "text_encoder_3" if family == "sd3" else "text_encoder_2"
            components[t5] = {"encoder.block.0.layer.0.SelfAttention.q": lora((64, 64), rank, alpha, 3, dtype)}
    return PortableAdapter(components, family)


def same(one, other):
    """Assert that two adapters hold the same layers with the same factors, bit for bit."""
    assert {c: set(m) for c, m in one.components.items()} == {c: set(m) for c, m in other.components.items()}
    for component, module, factors in one:
        there = other.components[component][module]
        assert type(there) is type(factors), module
        assert there.alpha == factors.alpha, (module, there.alpha, factors.alpha)
        assert there.scaling == factors.scaling
        assert there.tensors.keys() == factors.tensors.keys(), module
        for name, tensor in factors.tensors.items():
            assert there.tensors[name].dtype == tensor.dtype, (module, name)
            assert torch.equal(there.tensors[name], tensor), (module, name)


def same_updates(one, other, tolerance=1e-6):
    """Assert that two adapters do the same to every layer."""
    assert {c: set(m) for c, m in one.components.items()} == {c: set(m) for c, m in other.components.items()}
    for component, module, factors in one:
        wanted, found = factors.update(), other.components[component][module].update()
        assert found.shape == wanted.shape, (module, found.shape, wanted.shape)
        assert (found - wanted).norm() <= tolerance * wanted.norm(), module
