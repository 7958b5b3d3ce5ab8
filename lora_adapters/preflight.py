"""Does it fit? Memory that loading a model takes, known from file headers before any weight is read.

What counts on the host is memory that the system can't take back. safetensors files are mapped, so the pages of a file
that is being read are not counted; a weight that stays as it is in the file (no cast, no quantization) is counted,
because training will need its pages all the time.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .budget import format_size
from .checkpoint_size import TensorInfo, checkpoint_bytes, hub_checkpoint_bytes
from .errors import CheckpointError, DoesNotFitError, MissingDependencyError
from .free_memory import free_memory

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Share of the need that must stay free on top of it: allocators keep more than they hand out.
MARGIN = 0.10

#: Host bytes that libraries allocate once on their first load, whatever the model.
LIBRARY_BYTES = 24 << 20

#: transformers reads this many tensors at a time, fewer where there are fewer cores.
_READERS = 4

_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
_CASTABLE = ("F16", "BF16", "F32", "F64")

#: Formats that transformers quantizes to while it reads, tensor by tensor.
_WHILE_READING = {"nf4", "fp4", "int8"}


@dataclass(frozen=True)
class LoadNeed:
    """Bytes that loading takes.

    Attributes:
        host_peak: most host memory at one time that the system can't take back (weights in use included).
        device_weights: weights once loaded, plus what is in flight, on an accelerator; 0 on the CPU.
        device: "cpu", "cuda:0", "mps".
    """

    host_peak: int
    device_weights: int
    device: str


#: Given a tensor, returns its bytes once quantized, or None if it stays dense.
QuantizedBytes = Callable[[TensorInfo], "int | None"]


def plan_load(
    tensors: Iterable[TensorInfo],
    *,
    dtype: torch.dtype | None = None,
    quantized_bytes: QuantizedBytes | None = None,
    device: str = "cpu",
) -> LoadNeed:
    """Return what loading these tensors takes, with transformers' way of loading (tensor by tensor from mapped files).

    Host peak on the CPU: all weights as they end up, what its readers hold at one time (the largest tensor in the new
    dtype for each), two fp32 copies of the largest tensor being quantized, and `LIBRARY_BYTES`. On an accelerator the
    host only holds what is in flight. A shard's size does not matter.

    Args:
        tensors: from `checkpoint_bytes`.
        dtype: dtype of dense floating weights; None keeps the file's.
        quantized_bytes: bytes of a tensor once quantized; None quantizes nothing.
        device: where the weights go.
    """
    final = in_flight = quantizing = 0
    for tensor in tensors:
        dense = _cast_bytes(tensor, dtype)
        quantized = quantized_bytes(tensor) if quantized_bytes else None
        final += dense if quantized is None else quantized
        if quantized is not None:
            quantizing = max(quantizing, 2 * 4 * math.prod(tensor.shape))
        if dense != tensor.nbytes or quantized is not None or device != "cpu":
            in_flight = max(in_flight, dense)
    if device == "cpu":
        return LoadNeed(final + _readers() * in_flight + quantizing + LIBRARY_BYTES, 0, device)
    return LoadNeed(_readers() * in_flight + LIBRARY_BYTES, final + in_flight + quantizing, device)


def _readers() -> int:
    return min(_READERS, os.cpu_count() or _READERS)


def _cast_bytes(tensor: TensorInfo, dtype: torch.dtype | None) -> int:
    if dtype is None or tensor.dtype not in _CASTABLE:
        return tensor.nbytes
    return tensor.nbytes // _DTYPE_BYTES[tensor.dtype] * dtype.itemsize


def load_choices(
    tensors: Iterable[TensorInfo],
    *,
    device: str,
    quantizers: Mapping[str, QuantizedBytes] = {},
    dtype: torch.dtype | None = None,
) -> dict[str, LoadNeed]:
    """Return the need of other settings of `load`, by how they are written, for `check_fits` to suggest."""
    import torch

    tensors = list(tensors)
    places = [device] if device == "cpu" else [device, "cpu"]
    choices: dict[str, LoadNeed] = {}
    for place in places:
        prefix = "" if place == device else f'device="{place}"'
        kinds: dict[str, LoadNeed] = {'dtype="bfloat16"': plan_load(tensors, dtype=torch.bfloat16, device=place)}
        if place != device:
            kinds[""] = plan_load(tensors, dtype=dtype, device=place)
        for name, quantized in quantizers.items():
            need = plan_load(tensors, dtype=torch.bfloat16, quantized_bytes=quantized, device=place)
            kinds[f'quantization="{name}", dtype="bfloat16"'] = need
        choices |= {", ".join(filter(None, (prefix, words))): need for words, need in kinds.items()}
    return choices


def check_fits(
    need: LoadNeed,
    choices: Mapping[str, LoadNeed] = {},
    *,
    free: Callable[[str], int] | None = None,
    margin: float = MARGIN,
) -> None:
    """Raise if a load doesn't fit into what is free, with `margin` (a share of the need) left.

    Args:
        need: of the settings asked for.
        choices: needs of other settings, from `load_choices`; the message lists those that fit.
        free: free bytes of a device; `free_memory` by default.
        margin: share of the need to keep free.

    Raises:
        DoesNotFitError: it doesn't fit. The message says what is missing and which settings would fit.
    """
    free = free or free_memory
    available = {device: free(device) for device in {"cpu", need.device, *(c.device for c in choices.values())}}

    def missing(option: LoadNeed) -> dict[str, int]:
        wanted = {"cpu": option.host_peak}
        if option.device != "cpu":
            wanted[option.device] = option.device_weights
        over = {device: math.ceil(n * (1 + margin)) - available[device] for device, n in wanted.items()}
        return {device: n for device, n in over.items() if n > 0}

    if not (short := missing(need)):
        return
    fitting = [(words, option) for words, option in choices.items() if not missing(option)]
    lines = [f"Loading needs {_describe(need)}, with {margin:.0%} on top for safety; {_list_free(short, available)}."]
    if fitting:
        lines.append("These settings would fit:")
        lines += [f"  {words}: {_describe(option)}" for words, option in fitting]
    else:
        lines.append(f"Nothing that was tried fits{_closest(choices, missing)}. Free memory or take a smaller model.")
    raise DoesNotFitError("\n".join(lines))


def _describe(need: LoadNeed) -> str:
    host = f"{format_size(need.host_peak)} of host memory"
    return host if need.device == "cpu" else f"{format_size(need.device_weights)} on {need.device} and {host}"


def _list_free(short: Mapping[str, int], available: Mapping[str, int]) -> str:
    parts = [
        f"{format_size(available[d])} are free on {'the host' if d == 'cpu' else d}, {format_size(n)} too little"
        for d, n in short.items()
    ]
    return "; ".join(parts)


def _closest(choices: Mapping[str, LoadNeed], missing: Callable[[LoadNeed], dict[str, int]]) -> str:
    if not choices:
        return ""
    words, lacking = min(((w, sum(missing(c).values())) for w, c in choices.items()), key=lambda pair: pair[1])
    return f"; the closest, {words}, lacks {format_size(lacking)}"


def check_load(
    skeleton: nn.Module,
    formats: Mapping[str, str],
    *,
    name: str,
    revision: str | None,
    dtype: torch.dtype | None,
    device: str,
    free: Callable[[str], int] | None = None,
) -> LoadNeed:
    """Raise if a model doesn't fit, before any of its weights is read; return what it needs.

    Args:
        skeleton: the model on the meta device, dense.
        formats: module name -> quantization format, from `quantized_layers`.
        name: folder, or Hub repository, of the checkpoint.
        revision: Hub revision.
        dtype: dtype of dense floating weights.
        device: where the weights go.
        free: free bytes of a device; `free_memory` by default.

    Raises:
        DoesNotFitError: it doesn't fit. The message lists the settings that would fit.
        CheckpointError: the folder's files are damaged or incomplete.
    """
    tensors = _wanted(skeleton, _stored_dtype(name, revision))
    quantized = _quantized_by(formats)
    need = plan_load(tensors, dtype=dtype, quantized_bytes=quantized if formats else None, device=device)
    if not set(formats.values()) <= _WHILE_READING:  # loaded dense, then quantized layer by layer
        dense = plan_load(tensors, dtype=dtype, device=device)
        need = LoadNeed(
            max(need.host_peak, dense.host_peak), max(need.device_weights, dense.device_weights), need.device
        )
    try:
        check_fits(need, free=free)
    except DoesNotFitError:
        quantizers: dict[str, QuantizedBytes] = {}
        for kind in sorted(_WHILE_READING):
            with contextlib.suppress(MissingDependencyError):  # what is not installed is no way out
                from .quantized import quantized_layers

                quantizers[kind] = _quantized_by(quantized_layers(skeleton, kind))
        check_fits(need, load_choices(tensors, device=device, quantizers=quantizers, dtype=dtype), free=free)
    return need


def _quantized_by(formats: Mapping[str, str]) -> QuantizedBytes:
    from .hooks.manager import plugins
    from .weights import quantizer_for

    specs = plugins().quantizers() if set(formats.values()) - _WHILE_READING else None
    by_format = {kind: quantizer_for(kind, specs) for kind in set(formats.values())}

    def quantized(tensor: TensorInfo) -> int | None:
        module, _, part = tensor.name.rpartition(".")
        if part != "weight" or module not in formats:
            return None
        return by_format[formats[module]].nbytes(cast(Any, tensor.shape))

    return quantized


def _wanted(skeleton: nn.Module, stored: str) -> list[TensorInfo]:
    """Return what the model will hold, tied weights once, in the dtype that the files have it in.

    Where that is unknown ("") a dtype is assumed that has to be cast: the more expensive case.
    """
    tensors: list[TensorInfo] = []
    for name, tensor in [*skeleton.named_parameters(), *skeleton.named_buffers()]:
        dtype, size = "U8", tensor.element_size()
        if tensor.is_floating_point():
            dtype = stored or ("BF16" if size == 4 else "F32")
            size = _DTYPE_BYTES[dtype]
        tensors.append(TensorInfo(name, tuple(tensor.shape), dtype, size * tensor.numel()))
    return tensors


def _stored_dtype(name: str, revision: str | None) -> str:
    """Return the dtype that most of a checkpoint's floating bytes have, or "" if its headers can't be read."""
    folder = Path(name)
    try:
        tensors = checkpoint_bytes(folder) if folder.is_dir() else _cached_or_hub(name, revision)
    except OSError:
        return ""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    floating = {dtype: n for dtype, n in sizes.items() if dtype in _CASTABLE}
    return max(floating, key=lambda dtype: floating[dtype], default="")


def _cached_or_hub(name: str, revision: str | None) -> list[TensorInfo]:
    from huggingface_hub import try_to_load_from_cache

    for file in ("model.safetensors.index.json", "model.safetensors"):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            with contextlib.suppress(CheckpointError):  # a partly downloaded copy: the Hub has the headers
                return checkpoint_bytes(Path(found).parent)
    try:
        return hub_checkpoint_bytes(name, revision)
    except CheckpointError:
        return []  # other formats can't be looked into; sizes then come from the model's own shapes
