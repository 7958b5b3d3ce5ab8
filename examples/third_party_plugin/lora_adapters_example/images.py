"""Images from .npz files: as patches for the model, as PNG for the report."""

import base64
import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lora_adapters.errors import RequestError


@dataclass
class Images:
    """`pixels` (rows, height, width, colours) in 0..1, and one label name for each."""

    source: str
    pixels: np.ndarray
    labels: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices) -> "Images":
        return Images(self.source, self.pixels[indices], [self.labels[i] for i in indices])

    def patches(self, settings: dict) -> torch.Tensor:
        """Return (rows, patches, values of a patch) as the model's settings ask for."""
        rows, height, width, colours = self.pixels.shape
        side = math.isqrt(settings["values"] // colours)
        if (height % side, width % side) != (0, 0) or settings["values"] != side * side * colours:
            raise RequestError(f"data: {self.source}: {height} x {width} x {colours} makes no patches for this model.")
        cut = self.pixels.reshape(rows, height // side, side, width // side, side, colours).swapaxes(2, 3)
        found = torch.from_numpy(cut.reshape(rows, -1, settings["values"]).astype(np.float32))
        if found.shape[1] != settings["patches"]:
            raise RequestError(
                f"data: {self.source}: images of {height} x {width} have {found.shape[1]} patches, and the model takes "
                f"{settings['patches']}: resize them."
            )
        return found

    def png(self, index: int) -> str:
        """Return one image as PNG in base64, large enough to see."""
        pixels = (self.pixels[index] * 255).round().astype(np.uint8)
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        file = io.BytesIO()
        image.resize((96, 96), Image.Resampling.NEAREST).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode("ascii")


def read_images(path: str, key: str) -> Images:
    """Return what a file holds; `key` is the recipe's name for it, for messages."""
    if not Path(path).is_file():
        raise RequestError(f"{key}: there is no file {path!r}: give an .npz file.")
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels, labels = file["images"].astype(np.float32), file["labels"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise RequestError(f"{key}: {path} is no .npz file with images and labels: {error}") from error
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    right = pixels.ndim == 4 and pixels.shape[3] in (1, 3) and labels.shape == pixels.shape[:1] and len(labels) > 0
    if not right or not np.isfinite(pixels).all():
        raise RequestError(
            f"{key}: {path}: images must be finite and (rows, height, width) or (rows, height, width, 1 or 3), labels "
            f"(rows): got {pixels.shape} and {labels.shape}."
        )
    low, high = pixels.min(), pixels.max()
    return Images(path, (pixels - low) / max(high - low, 1e-6), [str(label) for label in labels])


def divide(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Return the rows to train on and a share of them held out, chosen by the seed."""
    count = round(len(images) * fraction)
    if not 0 < count < len(images):
        raise RequestError(f"data.eval_fraction: {fraction:g} of {len(images)} rows leaves one part empty.")
    order = np.random.default_rng(seed).permutation(len(images))
    return images.take(np.sort(order[count:])), images.take(np.sort(order[:count]))
