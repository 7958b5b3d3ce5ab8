"""Checkpoints that a resumed run can trust: a folder counts once its last act, a list of its files, is on the disk.

A run that is killed while it saves leaves a folder without that list, and a folder whose files were cut or lost no longer
agrees with it: both are passed over for the newest one that is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

#: Step of a checkpoint, from its folder's name.
_NAME = re.compile(r"checkpoint-(\d+)")
_COMPLETE = "complete.json"


def complete(folder: Path) -> None:
    """Declare a checkpoint whole: its files reach the disk first, the list of them last."""
    sizes: dict[str, int] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _COMPLETE):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    beside = folder / f".{_COMPLETE}"
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(sizes, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / _COMPLETE)


def is_complete(folder: Path) -> bool:
    """Return True if the folder holds every file of the checkpoint, each as long as it was."""
    try:
        sizes = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def step_of(folder: Path) -> int:
    """Return the step at which a checkpoint was made."""
    found = _NAME.fullmatch(folder.name)
    assert found is not None, folder
    return int(found[1])


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, whole or not, the newest first."""
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in a folder, or None."""
    return next((path for path in checkpoints(folder) if is_complete(path)), None)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest whole checkpoints, and those that are not whole."""
    whole = [path for path in checkpoints(folder) if is_complete(path)]
    for path in checkpoints(folder):
        if path not in whole[:keep]:
            shutil.rmtree(path)
