"""One image to train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from lora_adapters.errors import RequestError
from lora_adapters.pictures import BROKEN, why_broken

from .pixels import flattened, mask_of, opaque_and_alpha, upright


@dataclass(frozen=True, eq=False)
class Item:
    """An image to train on.

    Attributes:
        name: what messages call it.
        source: its file, or the image itself.
        caption: what is said of it, before triggers and tags.
        mask: file of its mask; "alpha": its own transparency.
        prior: it is of the class, not of the subject.
        size: (width, height) upright.
        digest: sha256 of its size, upright pixels and mask.
    """

    name: str
    source: Path | Image.Image
    caption: str
    mask: Path | Literal["alpha"] | None = None
    prior: bool = False
    size: tuple[int, int] = (0, 0)
    digest: str = ""

    def open(self) -> tuple[Image.Image, Image.Image | None]:
        """Return the upright image (RGB) and its mask (L).

        Raises:
            RequestError: one of them can't be read; the message says why, after the name of the image.
        """
        try:
            image = self._image()
            if self.mask == "alpha":
                return opaque_and_alpha(image)
            return flattened(image), None if self.mask is None else self._mask(self.mask)
        except BROKEN as error:
            raise RequestError(f"{self.name}: {_why(self.source, error)}") from error

    def _image(self) -> Image.Image:
        if isinstance(self.source, Image.Image):
            return upright(self.source)
        with Image.open(self.source) as file:
            return upright(_only_frame(file))

    def _mask(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as file:
                return mask_of(upright(_only_frame(file)))
        except BROKEN as error:
            raise ValueError(f"its mask {path} can't be read: {_why(path, error)}") from error


def _why(source: Path | Image.Image, error: Exception) -> str:
    # Plain ValueErrors are ours and PIL's: they say what they mean.
    return str(error) if type(error) is ValueError or isinstance(source, Image.Image) else why_broken(source, error)


def _only_frame(image: Image.Image) -> Image.Image:
    """Return the image. Cameras put previews behind a photo (MPO); other files of several images are refused."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ValueError(f"it holds {frames} images: save the one that is meant")
    return image
