"""From images to batches. What is random about an image follows from the seed, the epoch and its number alone.

So a resumed run sees the images that it would have seen, whatever else has drawn numbers and however many processes read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.data import Mixup, create_transform
from timm.data.auto_augment import posterize
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_adapters.errors import RequestError
from lora_adapters.runs.stopping import leave_signals

from .data import Images, image_mode

if TYPE_CHECKING:
    from .recipes import Augmentation

#: (epoch, number of the image).
Key = tuple[int, int]


@contextmanager
def drawn_from(*numbers: int) -> Iterator[None]:
    """Within this context Python's, numpy's and PyTorch's generators of the CPU begin from these numbers; after it they are
    where they were.
    """
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first, second, third = (int(word) for word in np.random.SeedSequence(numbers).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.random.default_generator.manual_seed(third)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def training_transform(config: dict[str, Any], augmentation: Augmentation) -> Any:
    """Return timm's transform of training images.

    Args:
        config: input_size (channels, height, width), mean, std, interpolation, crop_pct and crop_mode, as
            timm.data.resolve_model_data_config returns them.
        augmentation: the recipe's section.

    Raises:
        RequestError: timm knows no such policy.
    """
    if not augmentation.enabled:
        return evaluation_transform(config)
    try:
        _check_policy(augmentation.auto_augment or "")
        made = create_transform(
            input_size=config["input_size"],
            is_training=True,
            mean=config["mean"],
            std=config["std"],
            interpolation=augmentation.interpolation,
            scale=tuple(augmentation.scale),
            ratio=tuple(augmentation.ratio),
            hflip=augmentation.hflip,
            vflip=augmentation.vflip,
            color_jitter=augmentation.color_jitter or None,
            auto_augment=augmentation.auto_augment,
            re_prob=augmentation.erasing,
            re_mode=augmentation.erasing_mode,
        )
        _keep_a_bit(made)
        return made
    except (AssertionError, KeyError, ValueError, IndexError, TypeError) as error:
        raise RequestError(
            f"augmentation.auto_augment: timm has no policy {augmentation.auto_augment!r} ({error or 'not known'}). Take "
            '"rand-m9-mstd0.5-inc1", "original", "augmix-m5-w4-d2", or leave it out.'
        ) from error


def _check_policy(policy: str) -> None:
    """Raise for a setting without a number, which timm would pass over."""
    name, *settings = policy.split("-")
    if name in ("rand", "augmix"):
        for setting in settings:
            if not re.search(r"\d", setting) and not setting.startswith("t"):
                raise ValueError(f"{setting!r} has no number")


def _keep_a_bit(transform: Any) -> None:
    """Let posterizing leave at least one bit of each channel, in place: timm also asks for none, where Pillow 13 raises."""
    for step in transform.transforms:
        for op in [*getattr(step, "ops", ()), *(op for policy in getattr(step, "policy", ()) for op in policy)]:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize


def _posterize(image: Any, bits_to_keep: int, **options: Any) -> Any:
    return posterize(image, max(1, bits_to_keep), **options)


def evaluation_transform(config: dict[str, Any]) -> Any:
    """Return timm's transform of evaluation images; see `training_transform`."""
    return create_transform(**config, is_training=False)


class Prepared(Dataset[tuple[Tensor, int]]):
    """Images as the model takes them: (epoch, number) -> ((channels, height, width) float32, index of the class).

    Args:
        images: the images.
        labels: class names in the order of the classifier's outputs.
        transform: from an image to a tensor.
        channels: of the model.
        seed: what the transform draws follows from it; None for a transform that draws nothing.
    """

    def __init__(self, images: Images, labels: Sequence[str], transform: Any, channels: int, seed: int | None) -> None:
        self.images, self.transform, self.seed, self.mode = images, transform, seed, image_mode(channels)
        self.indices = {name: index for index, name in enumerate(labels)}

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, number = key
        image = self.images.read(self.images.items[number]).convert(self.mode)
        if self.seed is None:
            made = self.transform(image)
        else:
            with drawn_from(self.seed, epoch, number):
                made = self.transform(image)
        return made, self.indices[self.images.labels[number]]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, keys: Iterable[list[Key]], workers: int, pin: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (rows, channels, height, width), class indices (rows) int64) for each list of keys.

        Args:
            keys: what each batch is made of.
            workers: processes that read; 0 reads here.
            pin: put batches into pinned memory, from which a GPU copies while it computes.
        """
        loader = DataLoader(
            self,
            batch_sampler=keys,  # type: ignore[arg-type]
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=leave_signals,
            generator=torch.Generator(),  # else each loader takes a number from the generator that dropout draws from
        )
        yield from loader


class Mixing:
    """Mixup and CutMix by timm, and smoothed targets.

    Args:
        augmentation: the recipe's section.
        smoothing: share of the target that is spread over all classes.
        classes: number of classes.
        seed: what is drawn follows from it.
    """

    def __init__(self, augmentation: Augmentation, smoothing: float, classes: int, seed: int) -> None:
        self.smoothing, self.classes, self.seed = smoothing, classes, seed
        self.mix = None
        if augmentation.mixup or augmentation.cutmix:
            self.mix = Mixup(
                mixup_alpha=augmentation.mixup,
                cutmix_alpha=augmentation.cutmix,
                prob=augmentation.mix_probability,
                switch_prob=augmentation.mix_switch,
                mode=augmentation.mix_mode,
                label_smoothing=smoothing,
                num_classes=classes,
            )

    def __call__(self, images: Tensor, labels: Tensor, step: int, number: int) -> tuple[Tensor, Tensor]:
        """Return images and targets (rows, classes) float32, which sum to 1 in each row.

        Images are mixed in pairs, in place: of an odd number the last one stays as it is.

        Args:
            images: (rows, channels, height, width).
            labels: (rows) int64.
            step, number: of the batch; together with the seed they give what is drawn.
        """
        even = len(images) - len(images) % 2
        plain = mixup_target(labels, self.classes, smoothing=self.smoothing)
        if self.mix is None or not even:
            return images, plain
        with drawn_from(self.seed, step, number):
            mixed, targets = self.mix(images[:even], labels[:even])
        return torch.cat([mixed, images[even:]]), torch.cat([targets, plain[even:]])
