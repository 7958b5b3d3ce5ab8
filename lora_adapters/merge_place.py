"""The place where a merged model is written: checked before anything is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .budget import format_size
from .errors import DoesNotFitError, RequestError
from .staging import remove_litter

#: What makes a folder look like a model, so that it may be replaced when that was asked for.
_MARKS = ("config.json", "model_index.json")


def checked_folder(out: str | Path, overwrite: bool) -> Path:
    """Return the folder to write, links resolved.

    Raises:
        RequestError: it is not free.
    """
    folder = Path(os.path.realpath(Path(out).expanduser()))
    remove_litter(folder)
    if not os.path.lexists(folder):
        return folder
    if not folder.is_dir():
        raise RequestError(f"{out} is a file. Give a folder that does not exist yet.")
    if os.path.ismount(folder):
        raise RequestError(f"{out} is a disk of its own, which can't be put in place as one act. Give a folder in it.")
    if not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise RequestError(
            f"{out} holds files already. Give a folder that does not exist yet, or overwrite=True (--overwrite) to "
            "replace the model in it."
        )
    if not any((folder / mark).is_file() for mark in _MARKS):
        raise RequestError(
            f"{out} holds files, but no model ({_MARKS[0]}), so it is not replaced. Give another folder."
        )
    return folder


def checked_file(out: str | Path, overwrite: bool, needed: tuple[Path, ...]) -> Path:
    """Return the safetensors file to write, links resolved.

    Args:
        out: where to.
        overwrite: replace a file that is there.
        needed: files that are read, which can't be replaced.

    Raises:
        RequestError: it is not free.
    """
    file = Path(os.path.realpath(Path(out).expanduser()))
    if file.suffix != ".safetensors":
        raise RequestError(f"The base is one file, and so is the merged one: name it, as {out}.safetensors.")
    if file.is_dir():
        raise RequestError(f"{out} is a folder. The base is one file, and so is the merged one: name a file in it.")
    if file in [other.resolve() for other in needed]:
        raise RequestError(f"{out} is read for the merge, so it can't be replaced. Give another file.")
    if os.path.lexists(file) and not overwrite:
        raise RequestError(f"{out} exists. Give another file, or overwrite=True (--overwrite) to replace it.")
    return file


def check_apart(folder: Path, others: tuple[Path, ...]) -> None:
    """Raise RequestError if a folder to replace holds what is needed."""
    for other in others:
        if folder.is_dir() and other.is_dir() and other.resolve().is_relative_to(folder):
            raise RequestError(
                f"{folder} holds {other}, which is needed, so it can't be replaced. Give another folder."
            )


def check_space(out: Path, needed: int) -> None:
    """Raise DoesNotFitError if the disk of a place has fewer bytes than `needed`."""
    place = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DoesNotFitError(
            f"The merged model takes {format_size(needed)}, and {format_size(free)} are free on the disk of {place}. "
            "Free space, choose another folder, or a smaller dtype (bfloat16)."
        )
