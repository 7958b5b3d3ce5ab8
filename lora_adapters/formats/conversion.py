"""From one format to another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..adapter_config import DIFFUSERS_NAME
from ..errors import RequestError
from .families import family_of
from .low_rank import truncated
from .portable import PortableAdapter
from .registry import detect, make, read, write


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        source, target: the paths.
        source_format, target_format: the formats' names.
        family: what the adapter is for, "" if that can't be told.
        layers: component -> how many layers it adapts.
        notes: what is not as it was in the source, and how far off; nothing if the target holds all of it as it is.
    """

    source: str
    target: str
    source_format: str
    target_format: str
    family: str
    layers: dict[str, int]
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    format: str | None = None,
    family: str | None = None,
    max_rank: int | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write an adapter of a diffusion model in another format.

    Args:
        source: a safetensors file or a folder, of any known format.
        target: the file to write (a folder is given one, named as diffusers names it), or the folder for "peft".
        to: "diffusers", "peft", "kohya", "lycoris", "ai-toolkit", or a plugin's format.
        format: the source's format; None finds it.
        family: what the adapter is for, where its file does not tell: "sd1", "sd2", "sdxl", "sd3" or "flux".
        max_rank: cut layers down to this rank by their singular values; the notes say what part of the update is lost.
            For LoHa and LoKr, whose rank as plain LoRA can be large. None cuts nothing.
        overwrite: replace what is at the target.

    Returns:
        What was converted, with everything that is not as it was in the source.

    Raises:
        CheckpointError: the source is damaged, unsafe or of no known format, or writing failed.
        UnsupportedError: a format can't hold the adapter.
        RequestError: a wrong argument, or the target exists. Nothing has been written.
    """
    if max_rank is not None:
        check_max_rank(max_rank)
    make(to)  # An unknown name is an error before anything is read.
    found = format or detect(source)
    adapter = read(source, found, family)
    place = _target(Path(target).expanduser(), to)
    if place.exists() and not overwrite and not (place.is_dir() and not any(place.iterdir())):
        raise RequestError(f"{place} exists. Give another place, or overwrite it (overwrite=True, --overwrite).")
    if max_rank is not None:
        adapter = cut(adapter, max_rank)
    notes = (*adapter.notes, *write(adapter, place, to, family))
    layers = {component: len(modules) for component, modules in adapter.components.items()}
    return Conversion(str(source), str(place), found, to, family or family_of(adapter), layers, notes)


def _target(path: Path, to: str) -> Path:
    if to == "peft":
        return path
    if path.is_dir():
        return path / DIFFUSERS_NAME
    return path if path.suffix else path.with_suffix(".safetensors")


def check_max_rank(rank: object) -> None:
    """Raise RequestError if a rank to cut down to is no whole number of at least 1."""
    if type(rank) is not int or rank < 1:
        raise RequestError(f"max_rank must be a whole number of at least 1, got {rank!r}.")


def cut(adapter: PortableAdapter, rank: int) -> PortableAdapter:
    """Return an adapter with no layer above a rank; its notes say what part of the updates is lost."""
    errors: list[float] = []
    components: dict = {}
    for component, module, factors in adapter:
        made, error = truncated(factors, rank)
        components.setdefault(component, {})[module] = made
        errors.append(error)
    lossy = [error for error in errors if error]
    if not lossy:
        return adapter.with_components(components)
    note = (
        f"{len(lossy)} layers were cut to rank {rank}: |lost| / |update| is {sum(lossy) / len(lossy):.3g} on average, "
        f"{max(lossy):.3g} at most"
    )
    return adapter.with_components(components, note)
