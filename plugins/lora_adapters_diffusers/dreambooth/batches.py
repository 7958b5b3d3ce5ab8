"""Batches: which images a step takes, and how each is cropped and mirrored and what is said of it.

All of it follows from the seed and the key of an image, (pass, number), in whichever process and order they are read.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import Dataset

from lora_adapters.errors import LoraAdaptersWarning, RequestError

from .buckets import Size, View, bucket_sizes, nearest, to_pixels, to_weights, view_of
from .captions import training_caption, with_trigger
from .draws import Use, draws
from .items import Item

if TYPE_CHECKING:
    from ..recipes import SubjectData

#: (pass over the images, number of an image in a bucket).
Key = tuple[int, int]


@dataclass
class Example:
    """One image as training takes it.

    Attributes:
        pixels: (3, height, width) float32 in [-1, 1].
        mask: (1, height, width) float32 weights of the loss, None where all of the image counts.
        caption: what is said of it.
        original: (height, width) of the upright image.
        crop: (top, left) of the part that was taken, in pixels of the resized image.
        target: (height, width) of the batch.
        prior: it is of the class, not of the subject.
    """

    pixels: Tensor
    mask: Tensor | None
    caption: str
    original: Size
    crop: tuple[int, int]
    target: Size
    prior: bool


class Batches(Dataset[Example]):
    """The batches of each epoch. As a torch Dataset it can be read by a DataLoader, with `keys(epoch)` as batch_sampler.

    Attributes:
        buckets: sizes (height, width) that batches may have.
        counts: bucket -> number of images of the subject in it.
    """

    def __init__(
        self,
        items: Sequence[Item],
        data: SubjectData,
        *,
        batch_size: int,
        seed: int,
        resolution: int,
        multiple: int,
        prior: Sequence[Item] = (),
    ) -> None:
        """Sort images into buckets; none is read.

        Args:
            items: images of the subject.
            data: the recipe's section.
            batch_size: images of the subject in a batch; images of the class come on top.
            seed: what is random follows from it.
            resolution: what the model was made for, unless `data.resolution` says otherwise.
            multiple: what sides of images must be multiples of for the model.
            prior: images of the class.

        Raises:
            RequestError: there are no images, or the resolution is too small.

        Warns:
            LoraAdaptersWarning: more than half of an image is cropped away, as no bucket is of its shape.
        """
        if not items:
            raise RequestError("There are no images to train on.")
        self.data, self.batch_size, self.seed = data, batch_size, seed
        aspect = data.max_aspect if data.buckets else 1.0
        self.buckets = bucket_sizes(data.resolution or resolution, data.bucket_step, multiple, aspect)
        self._items = [*items, *prior]
        self._subjects = len(items)
        self._members: dict[Size, list[int]] = defaultdict(list)
        for number, item in enumerate(items):
            self._members[nearest((item.size[1], item.size[0]), self.buckets)].append(number)
        self.counts = {size: len(self._members[size]) for size in self.buckets if size in self._members}
        self._bucket_of = {number: size for size, numbers in self._members.items() for number in numbers}
        self._warn_of_cropping()

    def _warn_of_cropping(self) -> None:
        views = [self.view((0, number)) for number in range(self._subjects)]
        lost = [
            item.name
            for item, view in zip(self._items, views, strict=False)
            if math.prod(view.target) < math.prod(view.resized) / 2
        ]
        if lost:
            warnings.warn(
                f"More than half is cropped away of: {', '.join(lost)}. Crop them by hand, or raise data.max_aspect.",
                LoraAdaptersWarning,
                stacklevel=3,
            )

    # ---- which ones --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of batches of every epoch."""
        return sum(math.ceil(count * self.data.repeats / self.batch_size) for count in self.counts.values())

    def keys(self, epoch: int) -> list[list[Key]]:
        """Return the batches of an epoch, each of one bucket, in a new order: every image `data.repeats` times.

        The last batch of a bucket may be short. With images of the class each batch has as many of them behind those of the
        subject; they come in turn, each as often as the others.
        """
        passes = range(epoch * self.data.repeats, (epoch + 1) * self.data.repeats)
        batches: list[list[Key]] = []
        random = draws(Use.ORDER, self.seed, epoch)
        for size in self.counts:
            keys = [(one, number) for one in passes for number in self._members[size]]
            keys = [keys[i] for i in random.permutation(len(keys))]
            batches += [keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size)]
        batches = [batches[i] for i in random.permutation(len(batches))]
        return self._with_class(batches, epoch) if len(self._items) > self._subjects else batches

    def _with_class(self, batches: list[list[Key]], epoch: int) -> list[list[Key]]:
        place = epoch * self._subjects * self.data.repeats
        made = []
        for batch in batches:
            bucket = self.buckets.index(self._bucket_of[batch[0][1]])
            made.append([*batch, *(self._class_key(place + i, bucket) for i in range(len(batch)))])
            place += len(batch)
        return made

    def _class_key(self, place: int, bucket: int) -> Key:
        """Return the key of the image of the class at a place in the sequence of all that are taken, in a bucket."""
        count = len(self._items) - self._subjects
        one, index = divmod(place, count)
        return one, self._subjects + _order(self.seed, one, count)[index] * len(self.buckets) + bucket

    # ---- what they are -----------------------------------------------------------------------------------------------

    def item(self, key: Key) -> Item:
        """Return the image that a key names."""
        return self._item_in_bucket(key)[0]

    def view(self, key: Key) -> View:
        """Return what is taken of it, by its size alone: nothing is read."""
        item, bucket = self._item_in_bucket(key)
        random = draws(Use.PICTURE, self.seed, *key)
        crop, flip = self.data.crop == "random", self.data.flip
        return view_of((item.size[1], item.size[0]), bucket, random, random_crop=crop, flip=flip)

    def fingerprint(self, key: Key) -> str:
        """Return what the pixels of a key follow from, as a hash: the image and its view."""
        return hashlib.sha256(repr((self.item(key).digest, self.view(key))).encode()).hexdigest()

    def caption(self, key: Key) -> str:
        """Return what is said of it this time."""
        item = self.item(key)
        if item.prior:
            return item.caption
        return training_caption(item.caption, self.data, draws(Use.CAPTION, self.seed, *key))

    def captions(self) -> list[str]:
        """Return all that may be said, sorted, as long as tags are neither shuffled nor dropped."""
        trigger = self.data.trigger
        said = {item.caption if item.prior else with_trigger(item.caption, trigger) for item in self._items}
        return sorted(said | {""} if self.data.caption_dropout else said)

    def example(self, key: Key) -> Example:
        """Return the image, read, with all that belongs to it.

        Raises:
            RequestError: its file can no longer be read.
        """
        item, view = self.item(key), self.view(key)
        image, mask = item.open()
        weights = None if mask is None else to_weights(view.of(mask), self.data.mask_floor)
        original = item.size[1], item.size[0]
        pixels = to_pixels(view.of(image))
        return Example(pixels, weights, self.caption(key), original, view.crop, view.target, item.prior)

    def __getitem__(self, key: Key) -> Example:
        return self.example(key)

    def _item_in_bucket(self, key: Key) -> tuple[Item, Size]:
        number = key[1]
        if number < self._subjects:
            return self._items[number], self._bucket_of[number]
        index, bucket = divmod(number - self._subjects, len(self.buckets))
        return self._items[self._subjects + index], self.buckets[bucket]


def unchanging(data: SubjectData) -> SubjectData:
    """Return the section without anything random: for images that the loss is measured on."""
    still = dict(crop="center", flip=0.0, shuffle_tags=False, tag_dropout=0.0, caption_dropout=0.0, repeats=1)
    return data.model_copy(update=still)


@lru_cache(maxsize=4)
def _order(seed: int, one: int, count: int) -> list[int]:
    """Return the order of the images of the class in one pass over them."""
    return draws(Use.PRIOR, seed, one).permutation(count).tolist()
