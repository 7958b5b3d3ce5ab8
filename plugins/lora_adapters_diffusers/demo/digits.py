"""Real images for the demo: scikit-learn's handwritten digits, and a classifier of them that judges samples.

1797 images of 8 x 8 pixels from the UCI repository, part of the package, here blown up to SIZE x SIZE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

#: Pixels a side of what the model sees and makes.
SIZE = 16
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Digits:
    """Images (rows, 3, SIZE, SIZE), float32 in [-1, 1], ink white, and which digits they show (rows)."""

    pixels: Tensor
    classes: Tensor

    def of(self, classes: Sequence[int]) -> Digits:
        """Return the images of some digits."""
        rows = torch.isin(self.classes, torch.tensor(list(classes)))
        return Digits(self.pixels[rows], self.classes[rows])


def read_digits(seed: int) -> tuple[Digits, Digits]:
    """Return the training half and the held-out half, which the seed draws."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    classes = torch.tensor(data.target)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    return tuple(Digits(pixels[rows], classes[rows]) for rows in order.tensor_split(2))  # type: ignore[return-value]


def pictures(pixels: Tensor) -> list[Image.Image]:
    """Return images (rows, 3, height, width) in [-1, 1] as PIL images."""
    values = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in values]


class Judge:
    """A classifier of real digits (a support vector machine on 8 x 8 pixels), which says what samples show.

    Attributes:
        accuracy: share of the held-out real images that it names rightly.
    """

    def __init__(self, train: Digits, test: Digits) -> None:
        from sklearn.svm import SVC

        # 3 / (features * variance) is about what scikit-learn's own example of these images sets by hand (0.001).
        self._model = SVC(C=10, gamma="scale").fit(_features(train.pixels), train.classes.numpy())
        self.accuracy = float((self.name(test.pixels) == test.classes).float().mean())

    def name(self, pixels: Tensor) -> Tensor:
        """Return the digit (rows) that each image (rows, 3, SIZE, SIZE) in [-1, 1] shows."""
        return torch.tensor(self._model.predict(_features(pixels)))


def _features(pixels: Tensor) -> np.ndarray:
    return F.avg_pool2d(pixels.mean(1, keepdim=True), SIZE // 8).flatten(1).numpy()
