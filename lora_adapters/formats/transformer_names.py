"""Names of the layers of Flux and SD3 in their first releases, and which layers of diffusers they are.

Several differ by more than a name: q, k and v are one projection there (`Rename.diffusers` has several names, in the order
of the fused projection's rows), and the last modulation's halves, shift and scale, are the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .names import NameTable


@dataclass(frozen=True)
class Rename:
    """One layer of a release, as templates.

    Attributes:
        released: its name.
        diffusers: the layers it is in diffusers, in the order of its rows.
        swapped: its two halves of rows are the other way round.
    """

    released: str
    diffusers: tuple[str, ...]
    swapped: bool = False


def _stream(released: str, attention: str, mlp: str, norm: str, names: tuple[str, ...], out: str) -> list[Rename]:
    """One stream (image or text) of Flux's double blocks."""
    block, there = "transformer_blocks.#", f"double_blocks.#.{released}"
    return [
        Rename(f"{there}_attn.qkv", tuple(f"{block}.{attention}.{name}" for name in names)),
        Rename(f"{there}_attn.proj", (f"{block}.{attention}.{out}",)),
        Rename(f"{there}_mlp.0", (f"{block}.{mlp}.net.0.proj",)),
        Rename(f"{there}_mlp.2", (f"{block}.{mlp}.net.2",)),
        Rename(f"{there}_mod.lin", (f"{block}.{norm}.linear",)),
    ]


_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_SINGLE = "single_transformer_blocks.#"
_FLUX = [
    *_stream("img", "attn", "ff", "norm1", _QKV, "to_out.0"),
    *_stream("txt", "attn", "ff_context", "norm1_context", _ADDED, "to_add_out"),
    Rename("single_blocks.#.linear1", (*(f"{_SINGLE}.attn.{name}" for name in _QKV), f"{_SINGLE}.proj_mlp")),
    Rename("single_blocks.#.linear2", (f"{_SINGLE}.proj_out",)),
    Rename("single_blocks.#.modulation.lin", (f"{_SINGLE}.norm.linear",)),
    Rename("img_in", ("x_embedder",)),
    Rename("txt_in", ("context_embedder",)),
    *(
        Rename(f"{there}.{side}_layer", (f"time_text_embed.{here}_embedder.linear_{number}",))
        for there, here in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance"))
        for side, number in (("in", 1), ("out", 2))
    ),
    Rename("final_layer.linear", ("proj_out",)),
    Rename("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
]


def _joint(released: str, mlp: str, norm: str) -> list[Rename]:
    block, there = "transformer_blocks.#", f"joint_blocks.#.{released}"
    return [
        Rename(f"{there}.mlp.fc1", (f"{block}.{mlp}.net.0.proj",)),
        Rename(f"{there}.mlp.fc2", (f"{block}.{mlp}.net.2",)),
        Rename(f"{there}.adaLN_modulation.1", (f"{block}.{norm}.linear",)),
    ]


def _attention(released: str, attention: str, names: tuple[str, ...], out: str) -> list[Rename]:
    block, there = "transformer_blocks.#", f"joint_blocks.#.{released}"
    return [
        Rename(f"{there}.qkv", tuple(f"{block}.{attention}.{name}" for name in names)),
        Rename(f"{there}.proj", (f"{block}.{attention}.{out}",)),
    ]


_SD3 = [
    *_attention("x_block.attn", "attn", _QKV, "to_out.0"),
    *_attention("x_block.attn2", "attn2", _QKV, "to_out.0"),
    *_attention("context_block.attn", "attn", _ADDED, "to_add_out"),
    *_joint("x_block", "ff", "norm1"),
    *_joint("context_block", "ff_context", "norm1_context"),
    Rename("x_embedder.proj", ("pos_embed.proj",)),
    Rename("context_embedder", ("context_embedder",)),
    *(
        Rename(f"{there}.mlp.{place}", (f"time_text_embed.{here}_embedder.linear_{number}",))
        for there, here in (("t_embedder", "timestep"), ("y_embedder", "text"))
        for place, number in ((0, 1), (2, 2))
    ),
    Rename("final_layer.linear", ("proj_out",)),
    Rename("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
]


class Release:
    """The layers of one model: released name -> diffusers' names, and back."""

    def __init__(self, renames: list[Rename]):
        self.by_released: Mapping[str, Rename] = {rename.released: rename for rename in renames}
        self.by_diffusers: Mapping[str, tuple[Rename, int]] = {
            name: (rename, place) for rename in renames for place, name in enumerate(rename.diffusers)
        }
        self.released = NameTable(self.by_released)
        self.diffusers = NameTable(self.by_diffusers)


#: Family -> its release.
RELEASES: Mapping[str, Release] = {"flux": Release(_FLUX), "sd3": Release(_SD3)}
