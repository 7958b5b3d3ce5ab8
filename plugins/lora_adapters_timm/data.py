"""Images and their classes: from folders with one subfolder for each class, or datasets that timm names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import find_images_and_targets

from lora_adapters.error_text import first_line
from lora_adapters.errors import RequestError, UnsupportedError
from lora_adapters.pictures import BROKEN, each, open_image, why_broken
from lora_adapters.report.facts import DataFacts

if TYPE_CHECKING:
    from .recipes import ImageData

#: Broken files that an error names.
_NAMED = 3


@dataclass
class Images:
    """Images with the name of their class each; they are read one at a time.

    Attributes:
        source: as the recipe names it.
        items: what `read` takes, one for each image: a path, or an index.
        labels: class names, one for each image.
        classes: all class names of the source, sorted as timm sorts them.
        read: item -> image.
    """

    source: str
    items: list[Any]
    labels: list[str]
    classes: list[str]
    read: Callable[[Any], Image.Image]

    def __len__(self) -> int:
        return len(self.items)

    def take(self, indices: Iterable[int]) -> Images:
        """Return some of them, in this order."""
        chosen = list(indices)
        items, labels = [self.items[i] for i in chosen], [self.labels[i] for i in chosen]
        return Images(self.source, items, labels, self.classes, self.read)

    def facts(self, name: str) -> DataFacts:
        """Return what the report says of this part of the data."""
        counts = Counter(self.labels)
        shown = ", ".join(f"{label} {counts[label]}" for label in self.classes[:20])
        return DataFacts(name, self.source, len(self), {"classes": len(self.classes), "labels": shown})


def read_images(data: ImageData, part: str) -> Images:
    """Return the images that `data.train` or `data.eval` names.

    Args:
        data: the recipe's section.
        part: "train" or "eval".

    Raises:
        RequestError: there is no such folder, it holds no classes, or files that are no images; the message names them.
    """
    named = data.eval if part == "eval" and data.eval is not None else data.train
    key = f"data.{part}" if getattr(data, part) is not None else "data.train"
    if "/" in named and named.partition("/")[0].lower() in ("torch", "hfds"):
        return _of_timm(data, named, data.eval_split or data.split if part == "eval" else data.split, key)
    if data.eval_split is not None:
        raise RequestError(f"data.eval_split: {named!r} is a folder, which has no splits: give data.eval=FOLDER.")
    found = _of_folder(named, key)
    _check_files(found, key, decode=data.check == "decode")
    return found


def divide(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Return the images to train on and a share of them held out, chosen by the seed, both in their order.

    Raises:
        RequestError: a part would be empty.
    """
    count = round(len(images) * fraction)
    if not 0 < count < len(images):
        raise RequestError(f"data.eval_fraction: {fraction:g} of {len(images)} images leaves one part empty.")
    order = np.random.default_rng(seed).permutation(len(images))
    return images.take(np.sort(order[count:]).tolist()), images.take(np.sort(order[:count]).tolist())


def limited(images: Images, limit: int | None, seed: int) -> Images:
    """Return at most `limit` of them, drawn by the seed: the first ones would all be of one class."""
    if limit is None or limit >= len(images):
        return images
    return images.take(sorted(np.random.default_rng(seed).permutation(len(images))[:limit].tolist()))


def check_labels(images: Images, labels: Sequence[str], part: str) -> None:
    """Raise unless every image's class is one of `labels`."""
    for index, label in enumerate(images.labels):
        if label not in labels:
            near = get_close_matches(label, labels, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise RequestError(
                f"data.{part}: class {label!r} in {images.source} ({images.items[index]}) is none of the classes to train "
                f"for{hint} There are: {', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''}"
            )


def _of_folder(path: str, key: str) -> Images:
    if not Path(path).is_dir():
        raise RequestError(f"{key}: there is no folder {path!r}: give one with a subfolder for each class.")
    pairs, indices = find_images_and_targets(path)
    if not pairs:
        raise RequestError(
            f"{key}: {path} holds no image in a subfolder: give a folder with a subfolder for each class."
        )
    if "" in indices:
        stray = next(file for file, target in pairs if target == indices[""])
        raise RequestError(f"{key}: {stray} lies in no class's subfolder: move it into one, or away.")
    classes = sorted(indices, key=indices.__getitem__)
    files = [os.path.relpath(file, path) for file, _ in pairs]
    return Images(path, files, [classes[target] for _, target in pairs], classes, _File(path))


@dataclass(frozen=True)
class _File:
    """Reads files of a folder. A class of its own, so that worker processes can be given it."""

    folder: str

    def __call__(self, name: str) -> Image.Image:
        return open_image(Path(self.folder) / name)


@dataclass(frozen=True)
class _Row:
    """Reads rows of a dataset of timm's."""

    rows: Any
    source: str

    def __call__(self, index: int) -> Image.Image:
        try:
            image = self.rows[index][0]
        except BROKEN as error:
            raise RequestError(f"Image {index} of {self.source} can't be read: {error}.") from error
        return Image.open(image) if hasattr(image, "read") else image


def _of_timm(data: ImageData, name: str, split: str, key: str) -> Images:
    """Return a dataset that timm makes: torchvision's, or one of the `datasets` library."""
    try:
        made: Any = create_dataset(name, root=data.root, split=split)
    except (OSError, RuntimeError, ValueError, AssertionError, ImportError, TypeError) as error:
        raise RequestError(
            f"{key}: timm can't make the dataset {name!r} (data.root={data.root!r}): {first_line(error)}"
        ) from error
    try:
        if hasattr(made, "reader"):  # the reader gives the file itself: timm's dataset would pass over a broken one
            reader = made.reader
            rows, column = reader, reader.dataset.features[reader.label_key]
            classes, targets = list(column.names), [int(label) for label in reader.dataset[reader.label_key]]
        else:
            rows, classes, targets = made, [str(one) for one in made.classes], [int(label) for label in made.targets]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{key}: {name!r} does not say its classes ({error}): save its images as folders."
        ) from error
    source = f"{name} ({split})"
    return Images(source, list(range(len(targets))), [classes[i] for i in targets], classes, _Row(rows, source))


def _check_files(images: Images, key: str, decode: bool) -> None:
    """Raise if a file is no image, with its path: a run would else end at it after hours."""

    def problem(name: str) -> str:
        path = Path(images.source) / name
        try:
            with Image.open(path) as image:
                if decode:
                    image.load()
        except BROKEN as error:
            return f"{path} ({why_broken(path, error)})"
        return ""

    broken = [found for found in each(problem, images.items) if found]
    if broken:
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        are = "file is no image" if len(broken) == 1 else "files are no images"
        raise RequestError(
            f"{key}: {len(broken)} {are} that can be read: {', '.join(broken[:_NAMED])}{more}. Mend or remove "
            f"{'it' if len(broken) == 1 else 'them'}."
        )


def image_mode(channels: int) -> str:
    """Return PIL's mode of images with so many channels.

    Raises:
        UnsupportedError: image files hold no such number.
    """
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise UnsupportedError(f"A model of {channels} channels can't be trained on image files, which hold 1, 3 or 4.")
    return modes[channels]


def check_count(labels: Sequence[str]) -> None:
    """Raise unless there are two classes at least, each named once."""
    twice = [name for name, count in Counter(labels).items() if count > 1]
    if twice:
        raise RequestError(f"data.labels: {twice[0]!r} is named twice.")
    if len(labels) < 2:
        raise RequestError(
            f"data.labels: there is one class only, {next(iter(labels), None)!r}: two at least are needed."
        )
