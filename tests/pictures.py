"""Small PNG files of handwritten digits, one folder for each class."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digits(folder: Path, count: int, classes: int = 10, side: int = 16) -> str:
    """Write the first digits below `classes`, grey, `side` pixels a side; returns the folder."""
    digits = load_digits()
    chosen = [i for i, digit in enumerate(digits.target) if digit < classes][:count]
    for i in chosen:
        place = folder / f"digit{digits.target[i]}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[i] * 15).astype(np.uint8)
        Image.fromarray(pixels).resize((side, side)).save(place / f"{i:04}.png")
    return str(folder)


#: A vision transformer of 0.1 million values that takes images of 16 pixels a side.
TINY_VIT = {
    "name": "vit_tiny_patch16_224",
    "pretrained": False,
    "device": "cpu",
    "timm_kwargs": {"depth": 2, "embed_dim": 64, "num_heads": 2, "patch_size": 8},
}
