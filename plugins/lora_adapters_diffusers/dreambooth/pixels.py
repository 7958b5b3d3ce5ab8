"""From an image of any kind to upright RGB of 8 bits, and to masks."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

_WHITE = (255, 255, 255, 255)


def upright(image: Image.Image) -> Image.Image:
    """Return the image as the camera was held (EXIF orientation), with 8 bits a channel.

    Raises:
        ValueError: its values are neither of 8 nor of 16 bits.
    """
    return _eight_bits(ImageOps.exif_transpose(image))


def flattened(image: Image.Image) -> Image.Image:
    """Return an upright image as RGB, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image.convert("RGBA")).convert("RGB")


def opaque_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Return an upright image's colours as they are stored (RGB), and its opacity (L).

    Raises:
        ValueError: it has no transparency.
    """
    if not image.has_transparency_data:
        raise ValueError("it has no transparency, from which data.masks=alpha takes the mask")
    colours = image.convert("RGBA")
    return colours.convert("RGB"), colours.getchannel("A")


def mask_of(image: Image.Image) -> Image.Image:
    """Return an upright image of a mask as L: white counts, and what is transparent does not."""
    if not image.has_transparency_data:
        return image.convert("L")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image.convert("RGBA")).convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)  # PIL's own conversion cuts values off at 255
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("its values are neither of 8 nor of 16 bits: save it as PNG")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))
