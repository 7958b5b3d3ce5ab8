"""What a format is, and what all formats of one file share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from .. import __version__
from ..adapter_file import VERSION_ENTRY
from ..errors import CheckpointError
from ..staging import write_file
from ..tensor_file import check_finite
from .portable import PortableAdapter
from .source import Source


class Format(Protocol):
    """How adapters are written in one kind of file or folder. A `FormatSpec` names its class."""

    def detect(self, source: Source) -> bool:
        """Return True if a source is of this format, by its keys and metadata alone."""
        ...

    def read(self, source: Source) -> PortableAdapter:
        """Read a source that `detect` knows.

        Raises:
            CheckpointError: it is damaged.
            UnsupportedError: it holds what a PortableAdapter can't. Nothing is ever left out silently.
        """
        ...

    def write(self, adapter: PortableAdapter, path: Path, family: str) -> tuple[str, ...]:
        """Write an adapter, complete or not at all.

        Args:
            adapter: what to write.
            path: the file (or the folder, for a format of folders), replaced if it is there.
            family: "sd1", "sd2", "sdxl", "sd3", "flux", "" if unknown.

        Returns:
            What the format could not hold as it was, and how far off that is. Nothing if it reads back the same.

        Raises:
            UnsupportedError, RequestError: the format has no form for it. Nothing has been written.
        """
        ...


@dataclass(frozen=True)
class Encoded:
    """The content of one safetensors file.

    Attributes:
        tensors: key -> tensor.
        metadata: the header's string entries.
        notes: as `Format.write` returns.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()


def write_encoded(encoded: Encoded, path: Path) -> tuple[str, ...]:
    """Write a file as one act and return the notes.

    Raises:
        CheckpointError: values that are not finite, or writing failed. What was there before is unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Copies: tensors that share memory, as those of a split projection do, can't be stored.
    tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in encoded.tensors.items()}
    check_finite(tensors, "The adapter was not written")

    def write(place: Path) -> None:
        try:
            save_file(tensors, place, metadata={**encoded.metadata, VERSION_ENTRY: __version__})
        except SafetensorError as error:  # How it reports a full disk, among others.
            raise OSError(str(error)) from error

    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; this format is one file. Name the file.")
    write_file(path, write)
    return encoded.notes
