"""The formats there are, the built-in ones and those of plugins, and reading and writing by them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..adapter_file import PREFIX
from ..errors import CheckpointError, RequestError
from ..hooks.manager import plugins
from ..hooks.specs import FormatSpec
from .base import Format
from .families import family_named, family_of
from .portable import PortableAdapter
from .source import Source, open_source

_HERE = "lora_adapters.formats"
#: In the order in which they are tried.
BUILT_IN = (
    FormatSpec("peft", "PEFT folders, one for each component", f"{_HERE}.peft_folders:PeftFolders"),
    FormatSpec("kohya", "kohya's file (ComfyUI, A1111, Forge, InvokeAI): plain LoRA", f"{_HERE}.kohya_file:KohyaFile"),
    FormatSpec("lycoris", "kohya's names with LoHa, LoKr, Tucker cores, DoRA", f"{_HERE}.kohya_file:LycorisFile"),
    FormatSpec(
        "ai-toolkit", "ai-toolkit's file of a transformer, without alphas", f"{_HERE}.diffusers_file:AiToolkitFile"
    ),
    FormatSpec("diffusers", "diffusers' pytorch_lora_weights.safetensors", f"{_HERE}.diffusers_file:DiffusersFile"),
)


def specs() -> dict[str, FormatSpec]:
    """Return every format by name, plugins' before the built-in ones, which they can't replace."""
    own = {spec.name: spec for spec in BUILT_IN}
    return plugins().formats(taken=tuple(own)) | own


def make(name: str) -> Format:
    """Return a format.

    Raises:
        RequestError: there is none of this name.
    """
    known = specs()
    if name not in known:
        raise RequestError(f"There is no format {name[:40]!r}. Give one of {', '.join(known)}.")
    module, _, cls = known[name].target.partition(":")
    return getattr(importlib.import_module(module), cls)()


def detect(source: str | Path | Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Return the name of the format that a source is in. No tensor is read.

    Args:
        source: a safetensors file, a folder, or tensors by key.
        metadata: string entries that belong to tensors in memory.

    Raises:
        CheckpointError: it is damaged, or of no known format.
    """
    return _detect(open_source(source, metadata))


def _detect(source: Source) -> str:
    for name in specs():
        if make(name).detect(source):
            return name
    if any(key.startswith(PREFIX) for key in source.shapes):
        raise CheckpointError(f"{source.origin} is a PEFT folder's weights, which need their config. Give the folder.")
    shown = ", ".join(list(source.shapes)[:3])
    raise CheckpointError(
        f"{source.origin} is of no known format ({', '.join(specs())}): its tensors are named {shown[:300]}... If it is an "
        "adapter, say format=, or install the plugin that knows it."
    )


def read(
    source: str | Path | Mapping[str, Tensor],
    format: str | None = None,
    family: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> PortableAdapter:
    """Read an adapter of any format.

    Args:
        source: a safetensors file, a folder, or tensors by key.
        format: its name; None finds it.
        family: what it is for, where it does not say so itself: "sd1", "sd2", "sdxl", "sd3" or "flux".
        metadata: string entries that belong to tensors in memory.

    Raises:
        CheckpointError: it is damaged, unsafe, or of no known format.
        UnsupportedError: it holds what no format here can (OFT, weights trained whole, ...). Nothing is left out silently.
        RequestError: there is no such format or family, or the source is not of that format.
    """
    if family is not None:
        family_named(family)
    opened = replace(open_source(source, metadata), family=family or "")
    name = format or _detect(opened)
    reader = make(name)
    if format is not None and not reader.detect(opened):
        raise RequestError(f"{opened.origin} is not of the format {format!r}. Leave out format to find which it is.")
    return reader.read(opened)


def write(
    adapter: PortableAdapter, path: str | Path, format: str = "diffusers", family: str | None = None
) -> tuple[str, ...]:
    """Write an adapter, complete or not at all.

    Args:
        adapter: what `read` returned, or made of factors.
        path: a file (`.safetensors`), or the folder to make for "peft". What is there is replaced.
        format: name of the format.
        family: what it is for, where the adapter does not say so: "sd1", "sd2", "sdxl", "sd3" or "flux".

    Returns:
        What the format could not hold as it was, and how far off what it holds is; nothing if it reads back the same.

    Raises:
        UnsupportedError: the format has no form for the adapter.
        RequestError: no such format or family, or the family can't be told and matters.
        CheckpointError: values that are not finite, or writing failed. What was there before is unchanged.
    """
    if family is not None:
        family_named(family)
    if not len(adapter):
        raise RequestError("The adapter has no layers. Nothing was written.")
    return make(format).write(adapter, Path(path).expanduser(), family or family_of(adapter))
