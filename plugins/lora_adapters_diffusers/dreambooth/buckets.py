"""Aspect-ratio buckets: sizes of batches that follow the images' shapes, each with as many pixels.

The method is NovelAI's ("Aspect Ratio Bucketing", github.com/NovelAI/novelai-aspect-ratio-bucketing, 2022): sizes in
steps, each as large as the number of pixels allows; an image goes to the size whose logarithm of width over height is
nearest, is resized to cover it, and cropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from lora_adapters.errors import RequestError

#: (height, width).
Size = tuple[int, int]


def bucket_sizes(resolution: int, step: int, multiple: int, max_aspect: float) -> list[Size]:
    """Return the sizes (height, width) of batches, widest last; the square is one of them.

    Sides are multiples of `step` and `multiple`, no size has more than resolution ** 2 pixels, and no side of one (but of
    the square) could be longer by a step.

    Args:
        resolution: side of a square with as many pixels as an image may have.
        step: what sides should be multiples of.
        multiple: what the model needs them to be multiples of.
        max_aspect: longest side over the shortest; 1 gives the square alone.

    Raises:
        RequestError: not even the square holds one step.
    """
    step = math.lcm(step, multiple)
    square = resolution // step * step
    if not square:
        raise RequestError(
            f"data.resolution={resolution} is less than one step of {step} pixels: raise it, or lower data.bucket_step "
            f"(sides must be multiples of {multiple} for this model)."
        )

    def longest(side: int) -> int:
        return resolution * resolution // side // step * step

    sides = range(step, int(square * max_aspect) + step, step)
    pairs = {(longest(width), width) for width in sides if longest(width) and longest(longest(width)) == width}
    pairs = {(h, w) for h, w in pairs if max(h, w) <= max_aspect * min(h, w)} | {(square, square)}
    return sorted(pairs, key=lambda size: (size[1] / size[0], size))


def nearest(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket whose shape is nearest to that of an image of `size` (height, width)."""
    shape = math.log(size[1] / size[0])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[1] / bucket[0]) - shape), -bucket[0] * bucket[1]))


@dataclass(frozen=True)
class View:
    """What a batch takes of an image.

    Attributes:
        target: (height, width) of the batch.
        resized: (height, width) to which the image is resized, at least `target`.
        crop: (top, left) of the part that is taken, in pixels of the resized image, mirrored if it is.
        flipped: the image is mirrored.
    """

    target: Size
    resized: Size
    crop: tuple[int, int]
    flipped: bool

    def of(self, image: Image.Image) -> Image.Image:
        """Return that part of an image, or of its mask."""
        height, width = self.resized
        made = image.resize((width, height), Image.Resampling.LANCZOS if image.mode == "RGB" else Image.Resampling.BOX)
        if self.flipped:
            made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        top, left = self.crop
        return made.crop((left, top, left + self.target[1], top + self.target[0]))


def view_of(size: Size, target: Size, random: np.random.Generator, *, random_crop: bool, flip: float) -> View:
    """Return the view of an image of `size` (height, width) in a bucket.

    SDXL is told the image's size and the crop's corner (arXiv:2307.01952, sec. 2.2). The image is mirrored before it is
    cropped: the corner is one of the mirrored image, so that 0 still means that nothing is cut off at the left.

    Args:
        size: of the image.
        target: of the bucket.
        random: draws of this image and epoch.
        random_crop: take any part; else the middle.
        flip: probability of a mirror image.
    """
    scale = max(target[0] / size[0], target[1] / size[1])
    resized = max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))
    mirrored, *shares = random.random(3).tolist()
    spare = resized[0] - target[0], resized[1] - target[1]
    top, left = (int(s * (n + 1)) if random_crop else n // 2 for s, n in zip(shares, spare, strict=True))
    return View(target, resized, (top, left), mirrored < flip)


def to_pixels(image: Image.Image) -> Tensor:
    """Return an image as (3, height, width) float32 in [-1, 1], as diffusers' pipelines take it."""
    return VaeImageProcessor.normalize(VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image)))[0]


def to_weights(mask: Image.Image, floor: float) -> Tensor:
    """Return a mask as weights (1, height, width) float32: 1 where it is white, `floor` where it is black."""
    share = torch.from_numpy(np.array(mask, dtype=np.float32))[None] / 255
    return floor + (1 - floor) * share
