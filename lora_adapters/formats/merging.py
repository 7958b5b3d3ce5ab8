"""An adapter merged into a checkpoint of a diffusion model: one file, as UIs load it, or a folder of diffusers.

Everything is planned from the headers first. Writing then reads one tensor at a time, so that memory is needed for the
adapter and for the largest tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError
from ..tensor_file import Header, read_header
from ..tensor_stream import Change, rewrite, size_of
from .checkpoint_layers import CheckpointLayers, released_layers
from .families import family_of
from .folding import changes, merged_metadata
from .portable import PortableAdapter
from .registry import read


@dataclass(frozen=True)
class FileMerge:
    """A safetensors file to be written anew.

    Attributes:
        source: the file.
        header: its header.
        changes: key -> how its tensor changes.
        metadata: entries of the new header.
        dtype: torch's word for the dtype of all floating tensors; None keeps each one's.
    """

    source: Path
    header: Header
    changes: Mapping[str, Change]
    metadata: Mapping[str, str]
    dtype: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that will be written."""
        return size_of(self.header, self.dtype)

    def write(self, target: Path, done: Callable[[str], None] = lambda key: None) -> None:
        """Write the file; see `tensor_stream.rewrite`."""
        rewrite(self.source, self.header, target, self.changes, self.metadata, self.dtype, done)


@dataclass(frozen=True)
class MergePlan:
    """What merging will do.

    Attributes:
        family: of the checkpoint, "" if it can't be told.
        layers: how many layers the adapter changes.
        files: name in the new folder -> file to write anew; for a single file its own name alone.
        copies: name -> file to copy as it is.
        texts: name -> content of a small file that changes.
        notes: things worth knowing.
    """

    family: str
    layers: int
    files: Mapping[str, FileMerge]
    copies: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that will be written, but for headers and texts."""
        return sum(file.nbytes for file in self.files.values()) + sum(p.stat().st_size for p in self.copies.values())

    @property
    def tensors(self) -> int:
        """How many tensors will be written."""
        return sum(len(file.header.tensors) for file in self.files.values())


def released_checkpoint(path: Path) -> tuple[Header, CheckpointLayers] | None:
    """Return the header and the layers of a single file of a known family, None if the path is anything else.

    Raises:
        CheckpointError: it is a safetensors file, and damaged.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    header = read_header(path)
    layers = released_layers({key: info.shape for key, info in header.tensors.items()})
    return (header, layers) if layers else None


def read_adapter_for(adapter: str | Path, family: str, given: str | None) -> PortableAdapter:
    """Read an adapter of any format; where its file does not tell what it is for, it is for the checkpoint's family.

    Args:
        adapter: a file or a folder.
        family: the checkpoint's, "" if unknown.
        given: what the caller says that the adapter is for.
    """
    found = read(adapter, family=given)
    if given is None and family and not family_of(found):
        found = read(adapter, family=family)
    if not len(found):
        raise CheckpointError(f"{adapter} adapts no layer.")
    return found


def plan_file(
    base: Path, adapter: str | Path, *, scale: float = 1.0, dtype: str | None = None, family: str | None = None
) -> MergePlan:
    """Plan merging into a checkpoint of one file. No tensor of it is read.

    Args:
        base: a safetensors file with the names of Stable Diffusion's, SDXL's, SD3's or Flux's release.
        adapter: a file or folder of any format.
        scale: factor of the adapter.
        dtype: dtype of all floating tensors; None keeps each one's.
        family: what the adapter is for, where its file does not tell.

    Raises:
        CheckpointError: `base` is no such file, or the adapter is damaged or made for another model.
        UnsupportedError: the checkpoint is quantized, or the adapter holds what can't be merged.
    """
    found = released_checkpoint(base)
    if found is None:
        raise CheckpointError(
            f"{base} is no checkpoint of Stable Diffusion, SDXL, SD3 or Flux in one safetensors file."
        )
    header, layers = found
    loaded = read_adapter_for(adapter, layers.family, family)
    changed = changes(loaded, layers.slots, header.tensors, scale, str(base))
    metadata = merged_metadata(header.metadata, Path(adapter).name, scale, len(loaded))
    notes = loaded.notes
    if any(key.startswith("model_ema.") for key in header.tensors):
        notes = (*notes, "the checkpoint's average of its training (model_ema), which UIs don't load, is as it was")
    return MergePlan(
        layers.family, len(loaded), {base.name: FileMerge(base, header, changed, metadata, dtype)}, notes=notes
    )
