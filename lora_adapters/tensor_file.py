"""Reads safetensors files as untrusted data: the header alone first, then checked tensors.

Format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length (little endian), a JSON header
{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}, then the data without gaps.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .adapter_config import parse_json
from .errors import CheckpointError

if TYPE_CHECKING:
    import torch

#: An adapter of 70,000 tensors has a header of 13 MB.
MAX_HEADER_BYTES = 16 * 2**20
MAX_DIMENSIONS = 8
#: safetensors dtype -> bytes per value.
SIZES: Mapping[str, int] = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}
#: dtypes an adapter's own tensors may have.
FLOATING = ("F64", "F32", "F16", "BF16")
_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"} | {
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
NAMES = {name: dtype for dtype, name in _TORCH.items()}


def torch_name(dtype: str) -> str:
    """Return torch's word for a safetensors dtype, such as "float16" for "F16"."""
    return _TORCH[dtype]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a header: safetensors dtype, shape, and where its bytes lie behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked safetensors header.

    Attributes:
        tensors: key -> what and where it is, in the order of the data.
        metadata: the file's string entries.
        data_start: offset of the first data byte in the file.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file. Give the folder of a saved adapter.")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. Give the folder that a save wrote.") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}.") from error


def read_header(path: str | Path) -> Header:
    """Read and check a safetensors header; no tensor is read and nothing is allocated for one.

    Raises:
        CheckpointError: the file is missing, truncated, too long, or its header is malformed: unknown dtypes, offsets
            that overlap, leave holes or disagree with shape and file size.
    """
    path = Path(path)
    with _opened(path) as file:
        return _header(file, path)


def _header(file: BinaryIO, path: Path) -> Header:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length < 2 or 8 + length > size:
        raise _damaged(path, f"it is {size} bytes long, too short for its header")
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"its header claims {length} bytes, more than any adapter needs")
    raw = parse_json(file.read(length), f"The header of {path}")
    metadata = raw.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise _damaged(path, "its metadata is not a set of strings")
    tensors = {key: _tensor_info(path, key, value) for key, value in raw.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 0
    for key, info in tensors.items():
        if info.start != position:
            raise _damaged(path, f"the data of {key!r} overlaps another tensor or leaves a hole")
        position = info.end
    if 8 + length + position != size:
        raise _damaged(path, f"it is {size} bytes long where its header asks for {8 + length + position}")
    return Header(tensors, metadata, 8 + length)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {why}. Copy or download it again.")


def _whole(value: Any, limit: int = 2**53) -> bool:
    return type(value) is int and 0 <= value <= limit


def _tensor_info(path: Path, key: str, entry: Any) -> TensorInfo:
    if len(key) > 4096 or not key.isprintable():
        raise _damaged(path, f"the tensor name {key[:60]!r} is too long or not printable")
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {key[:200]!r} must hold dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in SIZES:
        raise _damaged(path, f"{key[:200]!r} has the unknown dtype {str(dtype)[:20]!r}")
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS or not all(_whole(side) for side in shape):
        raise _damaged(path, f"{key[:200]!r} has a malformed shape")
    if type(offsets) is not list or len(offsets) != 2 or not all(_whole(offset) for offset in offsets):
        raise _damaged(path, f"{key[:200]!r} has malformed offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * SIZES[dtype]:
        raise _damaged(path, f"{key[:200]!r} has {offsets[1] - offsets[0]} bytes, which is not its shape's size")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


class Digest:
    """sha256 over tensors in the order of their keys: for each its key, dtype, shape and bytes (little endian)."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, key: str, dtype: str, shape: tuple[int, ...], data: Any) -> None:
        """Add one tensor; `dtype` is safetensors' word, `data` its bytes."""
        self._hash.update(f"{key}\n{dtype}\n{list(shape)}\n".encode())
        self._hash.update(data)

    def text(self) -> str:
        """The digest as it stands in a file's metadata."""
        return f"sha256:{self._hash.hexdigest()}"


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of CPU tensors, equal to the one `read_tensors` finds in a file that holds them."""
    import torch

    digest = Digest()
    for key in sorted(tensors):
        tensor = tensors[key].detach().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        digest.add(key, NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), data)
    return digest.text()


def read_tensors(path: str | Path, header: Header) -> tuple[dict[str, torch.Tensor], str]:
    """Read all tensors into CPU memory, each checked to be finite.

    Args:
        path: the file.
        header: what `read_header` returned and the caller has checked.

    Returns:
        key -> tensor in the file's dtype, and the digest of what was read.

    Raises:
        CheckpointError: the file is not the one the header was read from, is truncated, or holds NaN or Inf (the
            message names the key).
    """
    import torch

    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    digest = Digest()
    with _opened(path) as file:
        if _header(file, path) != header:
            raise CheckpointError(f"{path} changed while it was being read. Try again when nothing writes to it.")
        for key in sorted(header.tensors):
            info = header.tensors[key]
            data = bytearray(info.end - info.start)
            file.seek(header.data_start + info.start)
            if file.readinto(data) != len(data):  # type: ignore[attr-defined]
                raise _damaged(path, f"{key!r} is cut off")
            digest.add(key, info.dtype, info.shape, data)
            dtype = getattr(torch, _TORCH[info.dtype])
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            tensors[key] = flat.reshape(info.shape)
    check_finite(tensors, str(path))
    return tensors, digest.text()


def check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise CheckpointError that names every tensor (the first five) holding NaN or Inf."""
    import torch

    def finite(tensor: torch.Tensor) -> bool:
        # float8 has no isfinite of its own.
        return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())

    bad = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not finite(tensor)]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise CheckpointError(
            f"{where}: NaN or infinite values in {', '.join(bad[:5])}{more}. The training that made this adapter "
            "diverged; use an earlier checkpoint."
        )
