"""Where files are kept that can be made again: generated images, computed tensors, small pretrained models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

#: Environment variable that names another folder.
VARIABLE = "LORA_ADAPTERS_CACHE"


def cache_folder(*parts: str) -> Path:
    """Return a folder of the user's cache, such as ~/.cache/lora-adapters/class-images; it need not exist.

    It is `LORA_ADAPTERS_CACHE` if that is set, else `lora-adapters` where the system keeps caches: XDG_CACHE_HOME or
    ~/.cache (XDG Base Directory Specification), ~/Library/Caches on macOS, LOCALAPPDATA on Windows.

    Args:
        parts: names of the subfolder.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser().joinpath(*parts)
    return _of_system().joinpath("lora-adapters", *parts)


def _of_system() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".cache"  # the specification: a relative one is ignored
