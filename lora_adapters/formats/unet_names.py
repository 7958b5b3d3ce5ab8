"""Names of the layers of diffusers' UNets, and of the LDM code (sgm) in which SDXL was released and kohya trains it.

The two are one structure counted differently. LDM numbers all blocks of a half through, diffusers by resolution:

    input_blocks.0.0                           conv_in
    input_blocks.I.0, .1                       down_blocks.B.resnets.L, .attentions.L    with (B, L) = divmod(I - 1, N + 1)
    input_blocks.I.0.op                        down_blocks.B.downsamplers.0.conv         where L = N
    middle_block.0, .1, .2                     mid_block.resnets.0, .attentions.0, .resnets.1
    output_blocks.I.0, .1                      up_blocks.B.resnets.L, .attentions.L      with (B, L) = divmod(I, N + 1)
    output_blocks.I.J.conv                     up_blocks.B.upsamplers.0.conv             the block's last
    time_embed.0, .2; label_emb.0.0, .0.2      time_embedding.linear_1, _2; add_embedding.linear_1, _2
    out.2                                      conv_out

where N is the number of resnets in a down block: 2 in every released Stable Diffusion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .names import NameTable

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_RESNET_BACK = {ldm: name for name, ldm in _RESNET.items()}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_OUTER_BACK = {ldm: name for name, ldm in _OUTER.items()}
#: Down blocks of SDXL's UNet have two resnets.
LAYERS_PER_BLOCK = 2


def _in_attention() -> Iterator[str]:
    yield from ("proj_in", "proj_out")
    for attention in ("attn1", "attn2"):
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            yield f"transformer_blocks.#.{attention}.{projection}"
    yield from ("transformer_blocks.#.ff.net.0.proj", "transformer_blocks.#.ff.net.2")


def _diffusers_templates() -> Iterator[str]:
    yield from _OUTER
    yield from ("class_embedding.linear_1", "class_embedding.linear_2")
    for block in ("down_blocks.#", "mid_block", "up_blocks.#"):
        yield from (f"{block}.resnets.#.{part}" for part in _RESNET)
        yield from (f"{block}.attentions.#.{part}" for part in _in_attention())
    yield from ("down_blocks.#.downsamplers.#.conv", "up_blocks.#.upsamplers.#.conv")


def _ldm_templates() -> Iterator[str]:
    yield from _OUTER_BACK
    for block in ("input_blocks.#.#", "middle_block.#", "output_blocks.#.#"):
        yield from (f"{block}.{part}" for part in _RESNET_BACK)
        yield from (f"{block}.{part}" for part in _in_attention())
    yield from ("input_blocks.#.0.op", "output_blocks.#.#.conv")


#: Every layer of a UNet2DConditionModel that adapters are trained on, as diffusers and as LDM names it.
DIFFUSERS_NAMES = NameTable(_diffusers_templates())
LDM_NAMES = NameTable(_ldm_templates())


def from_ldm(name: str, layers: int = LAYERS_PER_BLOCK) -> str | None:
    """Return diffusers' name of an LDM layer, both dotted; None if there is no such layer.

    Args:
        name: such as "input_blocks.4.1.proj_in".
        layers: resnets in a down block.
    """
    if name in _OUTER_BACK:
        return _OUTER_BACK[name]
    if found := re.fullmatch(r"input_blocks\.(\d+)\.([01])\.(.+)", name):
        return _down(int(found[1]) - 1, int(found[2]), found[3], layers)
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        place = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[found[1]]
        return _inner(f"mid_block.{place}", found[2])
    if found := re.fullmatch(r"output_blocks\.(\d+)\.([012])\.(.+)", name):
        block, layer = divmod(int(found[1]), layers + 1)
        if found[3] == "conv":
            return f"up_blocks.{block}.upsamplers.0.conv" if layer == layers and found[2] != "0" else None
        place = {"0": "resnets", "1": "attentions"}.get(found[2])
        return _inner(f"up_blocks.{block}.{place}.{layer}", found[3]) if place else None
    return None


def _down(index: int, place: int, part: str, layers: int) -> str | None:
    block, layer = divmod(index, layers + 1)
    if index < 0 or (layer == layers) != (part == "op"):
        return None
    if part == "op":
        return f"down_blocks.{block}.downsamplers.0.conv" if place == 0 else None
    return _inner(f"down_blocks.{block}.{('resnets', 'attentions')[place]}.{layer}", part)


def _inner(place: str, part: str) -> str | None:
    name = f"{place}.{_RESNET_BACK.get(part, part)}"
    # A resnet's part in the place of an attention, or the other way round, is no layer.
    return name if name in DIFFUSERS_NAMES else None


def to_ldm(name: str, layers: int = LAYERS_PER_BLOCK) -> str | None:
    """Return the LDM name of a layer of diffusers' UNet, both dotted; None if LDM has no such layer.

    An upsampler follows an attention, as in SDXL: its place is .2 (in Stable Diffusion 1's first up block it is .1).
    """
    if name in _OUTER:
        return _OUTER[name]
    if name not in DIFFUSERS_NAMES:
        return None
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", name):
        return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", name):
        return f"output_blocks.{int(found[1]) * (layers + 1) + layers}.2.conv"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.([01])\.(.+)", name):
        place = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}.get(f"{found[1]}.{found[2]}")
        return None if place is None else f"middle_block.{place}.{_RESNET.get(found[3], found[3])}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if not found or int(found[4]) > layers - (found[1] == "down"):
        return None
    index = int(found[2]) * (layers + 1) + int(found[4])
    half, index = ("input", index + 1) if found[1] == "down" else ("output", index)
    return f"{half}_blocks.{index}.{int(found[3] == 'attentions')}.{_RESNET.get(found[5], found[5])}"


def kernel_of(name: str, family: str) -> tuple[int, ...]:
    """Return the kernel of a UNet's layer, which LoHa's and LoKr's flattened factors do not hold; () for a linear layer."""
    last = name.rpartition(".")[2]
    if last in ("conv1", "conv2", "conv", "conv_in", "conv_out"):
        return (3, 3)
    if last == "conv_shortcut" or (last in ("proj_in", "proj_out") and family == "sd1"):
        return (1, 1)
    return ()
