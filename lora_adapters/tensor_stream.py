"""Rewrites a safetensors file with some of its values changed, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import CheckpointError, MergeError
from .tensor_file import NAMES, SIZES, Header, TensorInfo, read_header, torch_name

if TYPE_CHECKING:
    from torch import Tensor

_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_CHUNK = 16 * 2**20

#: A tensor in float64, which may be changed in place -> its new values, of the same shape.
Change = Callable[["Tensor"], "Tensor"]


def rewrite(
    source: Path,
    header: Header,
    target: Path,
    changes: Mapping[str, Change],
    metadata: Mapping[str, str],
    dtype: str | None = None,
    done: Callable[[str], None] = lambda key: None,
) -> None:
    """Write `source` to `target` with changed values; all other bytes of the data stay as they are.

    Args:
        source: a safetensors file.
        header: what `read_header` returned of it.
        target: the file to write.
        changes: key of a floating tensor -> what its values become. Computed in float64 and rounded once.
        metadata: string entries of the new header.
        dtype: torch's word for the dtype of all floating tensors; None keeps each tensor's.
        done: called with each tensor's key when it is written.

    Raises:
        CheckpointError: the file is no longer the one that `header` was read from.
        MergeError: values that were finite are not any more. The message names the tensor.
        OSError: writing failed.
    """
    if read_header(source) != header:
        raise CheckpointError(f"{source} changed while it was being read. Try again when nothing writes to it.")
    infos = _laid_out(header, dtype)
    with source.open("rb") as old, target.open("wb") as new:
        new.write(_head(infos, metadata))
        for key, info in infos.items():
            was = header.tensors[key]
            old.seek(header.data_start + was.start)
            if key in changes or info.dtype != was.dtype:
                new.write(_bytes(_changed(_tensor(old, was, source), changes.get(key), info, key)))
            else:
                _copy(old, new, was.end - was.start, source)
            done(key)


def size_of(header: Header, dtype: str | None) -> int:
    """Return the bytes of the tensors that `rewrite` would write."""
    return sum(info.end - info.start for info in _laid_out(header, dtype).values())


def _laid_out(header: Header, dtype: str | None) -> dict[str, TensorInfo]:
    """Return where each tensor will lie."""
    kinds = {
        key: NAMES[dtype] if dtype is not None and info.dtype in _FLOATING else info.dtype
        for key, info in header.tensors.items()
    }
    order = list(kinds)
    if any(kinds[key] != info.dtype for key, info in header.tensors.items()):
        # As safetensors does it: after values of a narrower type, wide ones would not be aligned, and can't be viewed.
        order.sort(key=lambda key: -SIZES[kinds[key]])
    found, position = {}, 0
    for key in order:
        info = header.tensors[key]
        length = (info.end - info.start) // SIZES[info.dtype] * SIZES[kinds[key]]
        found[key] = TensorInfo(kinds[key], info.shape, position, position + length)
        position += length
    return found


def _head(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for key, info in infos.items():
        entries[key] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor(file: BinaryIO, info: TensorInfo, path: Path) -> Tensor:
    import torch

    data = bytearray(info.end - info.start)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise CheckpointError(f"{path} is cut off. Copy or download it again.")
    dtype = getattr(torch, torch_name(info.dtype))
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(info.shape)


def _changed(tensor: Tensor, change: Change | None, info: TensorInfo, key: str) -> Tensor:
    import torch

    wide = tensor.double()
    finite = wide.isfinite().all()
    made = (change(wide) if change else wide).to(getattr(torch, torch_name(info.dtype)))
    if finite and not made.isfinite().all():
        raise MergeError(
            f"{key!r} would hold values that are not finite in {torch_name(info.dtype)}. Use a smaller scale, a dtype of "
            "wider range (bfloat16, float32), or another adapter. Nothing was written."
        )
    return made.reshape(info.shape)


def _bytes(tensor: Tensor) -> Any:
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def _copy(source: BinaryIO, target: BinaryIO, length: int, path: Path) -> None:
    while length:
        data = source.read(min(length, _CHUNK))
        if not data:
            raise CheckpointError(f"{path} is cut off. Copy or download it again.")
        target.write(data)
        length -= len(data)
