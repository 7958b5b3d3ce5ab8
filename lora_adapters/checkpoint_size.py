"""Names, shapes, dtypes and bytes of a model checkpoint's tensors, from file headers: no weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint. `dtype` is safetensors' name ("BF16"); `nbytes` as stored.

    A .bin file, which can't be looked into safely, is one entry with shape () and dtype "".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def checkpoint_bytes(folder: str | Path) -> list[TensorInfo]:
    """Return the tensors of a model folder from the headers of its files. No weight is read.

    Raises:
        CheckpointError: no weights in the folder, a shard that the index names is missing, or a damaged header.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(_shards(index)))]
        if missing := [f.name for f in files if not f.is_file()]:
            raise CheckpointError(f"{folder} misses {', '.join(missing)}, which {index.name} names. Download it again.")
    else:
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if files:
        return [tensor for file in files for tensor in read_header(file)]
    bins = sorted(folder.glob("*.bin"))
    if not bins:
        raise CheckpointError(f"{folder} holds no *.safetensors or *.bin weights. Check the path.")
    return [TensorInfo(file.name, (), "", file.stat().st_size) for file in bins]


def _shards(index: Path) -> Iterable[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names files outside of its folder. Don't load it.")
        return names
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error}). Download it again.") from error


def read_header(path: Path) -> list[TensorInfo]:
    """Return the tensors that a safetensors file's header lists.

    Format: 8 bytes little-endian length, JSON of that length, data (safetensors' README).

    Raises:
        CheckpointError: the header is damaged or describes more data than the file has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, 100_000_000):
            raise CheckpointError(f"{path} is damaged: its header claims {length} bytes. Download it again.")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        tensors = [_tensor(name, entry) for name, entry in header.items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged: its header can't be read ({error}). Download it again.") from error
    if end > size - 8 - length:
        raise CheckpointError(f"{path} is incomplete: {size} of {8 + length + end} bytes. Download it again.")
    return tensors


def _tensor(name: str, entry: Mapping[str, Any]) -> TensorInfo:
    begin, end = entry["data_offsets"]
    return TensorInfo(name, tuple(int(n) for n in entry["shape"]), str(entry["dtype"]), int(end) - int(begin))


def hub_checkpoint_bytes(name: str, revision: str | None = None) -> list[TensorInfo]:
    """Return the tensors of a Hub repository from its headers (a few kB a file are fetched, no weights).

    Raises:
        CheckpointError: the repository has no safetensors weights.
        OSError: the Hub can't be reached.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{name} has no safetensors weights, so its size can't be known beforehand.") from error
    return [
        TensorInfo(key, tuple(t.shape), str(t.dtype), t.data_offsets[1] - t.data_offsets[0])
        for file in metadata.files_metadata.values()
        for key, t in file.tensors.items()
    ]
