"""What is read: a file, a folder or tensors in memory, opened as untrusted data, its header before its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapter_config import CONFIG_NAME, DIFFUSERS_NAME, WEIGHTS_NAME
from ..errors import CheckpointError, RequestError
from ..tensor_file import FLOATING, Header, check_finite, read_header, read_tensors

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: Alphas are whole numbers in some files.
_NUMBERS = (*FLOATING, "I64", "I32", "I16", "I8", "U8")


@dataclass(frozen=True)
class Source:
    """Something to read an adapter from.

    Attributes:
        origin: its path, or "the tensors", for messages.
        shapes: key -> shape of every tensor; empty for a folder of PEFT folders.
        metadata: the file's string entries. Untrusted.
        folder: the folder that is a PEFT folder, or holds one for each component; None for a file and for tensors.
        path: the file; None for tensors and folders.
        family: what the caller says that it is for, "" if nothing.
        load: reads the values into CPU memory, each checked to be finite.
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    load: Callable[[], Mapping[str, Tensor]]
    folder: Path | None = None
    path: Path | None = None
    family: str = ""


def open_source(source: str | Path | Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Source:
    """Open a source. No tensor is read.

    Args:
        source: a safetensors file, a folder that holds one (or PEFT folders), or tensors by key.
        metadata: string entries that belong to tensors in memory.

    Raises:
        CheckpointError: it is missing, damaged, unsafe (a pickle), or a folder with no adapter or with several.
        RequestError: `metadata` was given with a path.
    """
    if isinstance(source, Mapping):
        return _in_memory(source, metadata or {})
    if metadata is not None:
        raise RequestError("A file has metadata of its own. Leave out metadata, or give the tensors.")
    path = Path(source).expanduser()
    if path.is_dir():
        if is_peft_root(path):
            return Source(str(path), {}, {}, dict, folder=path)
        path = _file_in(path)
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when read, so it is not loaded. If you trust it, load it with "
            "torch.load(..., weights_only=True), and save the tensors as safetensors."
        )
    header = read_header(path)
    _check_dtypes(header, path)
    return Source(
        str(path),
        {key: info.shape for key, info in header.tensors.items()},
        header.metadata,
        lambda: read_tensors(path, header)[0],
        path=path,
    )


def is_peft_root(folder: Path) -> bool:
    """Return True for a PEFT folder, and for a folder whose subfolders are PEFT folders."""
    return any((place / CONFIG_NAME).is_file() for place in [folder, *sorted(folder.iterdir())] if place.is_dir())


def _file_in(folder: Path) -> Path:
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    named = [path for path in files if path.name == DIFFUSERS_NAME]
    if named or len(files) == 1:
        return (named or files)[0]
    if not files:
        raise CheckpointError(
            f"{folder} holds no adapter: neither {CONFIG_NAME} and {WEIGHTS_NAME}, nor a file such as {DIFFUSERS_NAME}."
        )
    raise CheckpointError(
        f"{folder} holds several files: {', '.join(path.name for path in files[:5])}. Give one of them."
    )


def _check_dtypes(header: Header, path: Path) -> None:
    if not header.tensors:
        raise CheckpointError(f"{path} holds no tensors. Save the adapter again.")
    for key, info in header.tensors.items():
        if info.dtype not in (_NUMBERS if key.endswith(".alpha") else FLOATING):
            raise CheckpointError(
                f"{path}: {key[:200]} has dtype {info.dtype}; an adapter's tensors must be {', '.join(FLOATING)}. Save the "
                "adapter in one of these."
            )


def _in_memory(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Source:
    if not tensors:
        raise RequestError("There are no tensors to read. Give an adapter's state dict, or its file.")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise RequestError(
                f"{str(key)[:60]!r}: an adapter's state dict holds tensors by name, not {type(tensor).__name__}."
            )
        if not (tensor.is_floating_point() or key.endswith(".alpha")) or tensor.element_size() == 1:
            raise CheckpointError(
                f"{key[:200]} has dtype {tensor.dtype}; an adapter's tensors must be floating, of 16 bits or more."
            )

    def load() -> Mapping[str, Tensor]:
        with torch.no_grad():
            values = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        check_finite(values, "The tensors")
        return values

    return Source("the tensors", {key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata, load)
