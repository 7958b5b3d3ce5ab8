"""Image files: opening them, saying what is wrong with them, and showing them in a report."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from .errors import RequestError

Item = TypeVar("Item")
Found = TypeVar("Found")

#: What PIL and its decoders raise for a file that is no whole image.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, UnidentifiedImageError, Image.DecompressionBombError)
#: Pixels a side of a picture in the report.
_SHOWN = 160


def open_image(path: str | Path) -> Image.Image:
    """Return a file's image, decoded.

    Raises:
        RequestError: the file is not there, empty, or no whole image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except BROKEN as error:
        raise RequestError(f"{path} is no image that can be read: {why_broken(path, error)}.") from error


def why_broken(path: str | Path, error: Exception) -> str:
    """Return what is wrong with a file of which PIL raised `error`, one of `BROKEN`."""
    file = Path(path)
    if not file.is_file():
        return "there is no such file"
    if file.stat().st_size == 0:
        return "it is empty"
    return "it is of no known format" if isinstance(error, UnidentifiedImageError) else str(error) or "it is damaged"


def each(work: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """Return work(item) of each item, in their order, in several threads: PIL's decoders and file systems wait there."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))


def png(image: Image.Image, side: int = _SHOWN) -> str:
    """Return an image as PNG in base64, its longer side `side` pixels: small enough for a report, large enough to see."""
    factor = side / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    # Enlarged pixels stay pixels; a picture made smaller is smoothed.
    resampling = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BICUBIC
    file = io.BytesIO()
    image.convert("RGB").resize(size, resampling).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
