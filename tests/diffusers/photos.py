"""A few small photos of one subject, cut out of scikit-learn's pictures."""

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_image

#: Left, top, width and height of each piece of the flower.
_PIECES = [(200, 60, 200, 200), (180, 40, 240, 240), (220, 90, 180, 180), (160, 60, 280, 200), (210, 40, 180, 260)]


def write_photos(folder: Path, count: int = 5, side: int = 24, square: bool = False) -> str:
    """Write PNG files, as `photos` returns them; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(photos(count, side, square)):
        image.save(folder / f"{i}.png")
    return str(folder)


def photos(count: int = 5, side: int = 24, square: bool = False) -> list[Image.Image]:
    """Return photos whose shorter side has `side` pixels; three of five are square, unless all are to be."""
    flower = Image.fromarray(load_sample_image("flower.jpg"))
    found = []
    for left, top, width, height in _PIECES[:count]:
        if square:
            width = height = min(width, height)
        scale = side / min(width, height)
        piece = flower.crop((left, top, left + width, top + height))
        found.append(piece.resize((round(width * scale), round(height * scale))))
    return found
