"""Where the layers of a pipeline stand in a checkpoint of one file, as Stable Diffusion 1, 2, XL, 3 and Flux were released.

Their names differ from diffusers', and some tensors are of several layers: q, k and v of OpenCLIP, SD3 and Flux.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from .names import fill, flat
from .text_encoder_names import CLIP_NAMES, T5_NAMES, with_text_model
from .transformer_names import RELEASES, Rename
from .unet_names import LAYERS_PER_BLOCK, from_ldm

#: Component and module in diffusers' names.
Layer = tuple[str, str]
Shapes = Mapping[str, tuple[int, ...]]

_DENOISER = "model.diffusion_model."
#: Beginning of names -> component, for text encoders with the names of transformers.
_ENCODERS = {
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "t5",
}
#: The same for those with OpenCLIP's names. SDXL's refiner has its second encoder alone.
_OPEN_CLIPS = {
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
_OPEN_CLIP_NAMES = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_T5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}


@dataclass(frozen=True)
class Slot:
    """Where one layer's weight is.

    Attributes:
        weight: key of the tensor.
        bias: key of the bias; a checkpoint need not have it.
        shape: the weight's, as diffusers has it.
        start: first of its rows in the tensor, which may hold other layers too.
        swapped: the two halves of its rows are the other way round in diffusers.
        transposed: the tensor is (in, out).
    """

    weight: str
    bias: str
    shape: tuple[int, ...]
    start: int = 0
    swapped: bool = False
    transposed: bool = False

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the layer's rows of its weight's or bias' tensor, as a view."""
        whole = tensor.T if self.transposed and tensor.dim() > 1 else tensor
        return whole[self.start : self.start + self.shape[0]]

    def turned(self, rows: Tensor) -> Tensor:
        """Return rows of the checkpoint as diffusers has them, and the other way round: it is its own inverse."""
        return rows.roll(rows.shape[0] // 2, 0) if self.swapped else rows


@dataclass(frozen=True)
class CheckpointLayers:
    """What a checkpoint holds.

    Attributes:
        family: "sd1", "sd2", "sdxl", "sd3", "flux"; "" for a UNet alone whose sizes don't tell.
        slots: layer -> where it is.
    """

    family: str
    slots: Mapping[Layer, Slot]


def released_layers(shapes: Shapes) -> CheckpointLayers | None:
    """Return the layers of a checkpoint in one file, None if it has no denoiser of a known family.

    Args:
        shapes: key -> shape of every tensor.
    """
    prefix = _DENOISER if any(key.startswith(_DENOISER) for key in shapes) else ""
    inner = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    family = _family(inner, shapes)
    if family is None:
        return None
    slots: dict[Layer, Slot] = {}
    found = _in_release(inner, prefix, family) if family in RELEASES else _in_unet(inner, prefix)
    for layer, slot in found:
        slots[layer] = slot
    for layer, slot in _in_encoders(shapes, family):
        slots[layer] = slot
    return CheckpointLayers(family, slots)


def named_layers(component: str, shapes: Shapes) -> dict[Layer, Slot]:
    """Return the layers of a component's folder, whose tensors have the names of its modules."""
    return {
        (component, with_text_model(component, module)): Slot(key, f"{module}.bias", shape)
        for key, module, shape in _weights(shapes)
    }


def _weights(shapes: Shapes) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (key, the layer's name, shape) of everything that may be a layer's weight."""
    for key, shape in shapes.items():
        if key.endswith(".weight") and len(shape) > 1:
            yield key, key.removesuffix(".weight"), shape


def _family(inner: Shapes, shapes: Shapes) -> str | None:
    for family, block in (("flux", "double_blocks."), ("sd3", "joint_blocks.")):
        if any(key.startswith(block) for key in inner):
            return family
    if not any(key.startswith("input_blocks.") for key in inner):
        return None
    for start, family in (("conditioner.embedders.", "sdxl"), ("cond_stage_model.transformer.", "sd1")):
        if any(key.startswith(start) for key in shapes):
            return family
    if any(key.startswith("cond_stage_model.model.") for key in shapes):
        return "sd2"
    if "label_emb.0.0.weight" in inner:
        return "sdxl"
    widths = {shape[1] for key, shape in inner.items() if key.endswith(".attn2.to_k.weight")}
    return {768: "sd1", 1024: "sd2"}.get(widths.pop(), "") if len(widths) == 1 else ""


def _in_unet(inner: Shapes, prefix: str) -> Iterator[tuple[Layer, Slot]]:
    downs = [int(found[1]) for key in inner if (found := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", key))]
    layers = min(downs) - 1 if downs else LAYERS_PER_BLOCK
    for key, name, shape in _weights(inner):
        if module := from_ldm(name, layers):
            yield ("unet", module), Slot(prefix + key, f"{prefix}{name}.bias", shape)


def _in_release(inner: Shapes, prefix: str, family: str) -> Iterator[tuple[Layer, Slot]]:
    release = RELEASES[family]
    for key, name, shape in _weights(inner):
        if name in release.released and (found := release.released.match(flat(name))):
            rename, numbers = release.by_released[found[0]], found[1]
            sizes, start = _sizes(len(rename.diffusers), shape), 0
            for template, size in zip(rename.diffusers, sizes, strict=True):
                swapped = rename.swapped or _is_last_norm(rename, shape)
                slot = Slot(prefix + key, f"{prefix}{name}.bias", (size, *shape[1:]), start, swapped)
                yield ("transformer", fill(template, numbers)), slot
                start += size


def _sizes(count: int, shape: tuple[int, ...]) -> list[int]:
    """Rows of each of the layers that a tensor holds: q, k and v, or those and the feed-forward's first."""
    out, inside = shape[:2]
    return {1: [out], 3: [out // 3] * 3}.get(count, [inside] * 3 + [out - 3 * inside])


def _is_last_norm(rename: Rename, shape: tuple[int, ...]) -> bool:
    """True for the modulation of SD3's last block, which has two parts; in others it has six."""
    return rename.diffusers[0].endswith(".norm1_context.linear") and shape[0] == 2 * shape[1]


def _in_encoders(shapes: Shapes, family: str) -> Iterator[tuple[Layer, Slot]]:
    for prefix, component in _ENCODERS.items():
        component = _T5.get(family, "") if component == "t5" else component
        for key, name, shape in _weights({k: shape for k, shape in shapes.items() if k.startswith(prefix)}):
            # Some checkpoints were saved without "text_model.".
            module = with_text_model(component, name.removeprefix(prefix))
            if module in CLIP_NAMES or module in T5_NAMES:
                yield (component, module), Slot(key, f"{name}.bias", shape)
    for prefix, component in _OPEN_CLIPS.items():
        for key, shape in shapes.items():
            if key.startswith(prefix):
                yield from _in_open_clip(key, shape, component, key.removeprefix(prefix))


def _in_open_clip(key: str, shape: tuple[int, ...], component: str, name: str) -> Iterator[tuple[Layer, Slot]]:
    if name == "text_projection":
        yield (component, name), Slot(key, f"{key}_bias", (shape[1], shape[0]), transposed=True)
    if not (found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._]weight", name)):
        return
    layer = f"text_model.encoder.layers.{found[1]}"
    bias = f"{key.removesuffix('weight')}bias"
    if found[2] == "attn.in_proj":
        width = shape[0] // 3
        for place, letter in enumerate("qkv"):
            module = f"{layer}.self_attn.{letter}_proj"
            yield (component, module), Slot(key, bias, (width, shape[1]), place * width)
    elif found[2] in _OPEN_CLIP_NAMES:
        yield (component, f"{layer}.{_OPEN_CLIP_NAMES[found[2]]}"), Slot(key, bias, shape)
