"""The training images of a run in batches, in an order that follows from the seed and the epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..augmentation import Key, Prepared


class ImageBatches:
    """See `lora_adapters.runs.loop.Batches`; a key is (epoch, number of the image).

    Args:
        prepared: the images.
        size: images in a batch.
        seed: gives the order, with the epoch's number.
        workers, pin: see `Prepared.batches`.
    """

    def __init__(self, prepared: Prepared, size: int, seed: int, workers: int, pin: bool) -> None:
        self.prepared, self.size, self.seed, self.workers, self.pin = prepared, size, seed, workers, pin

    def __len__(self) -> int:
        return math.ceil(len(self.prepared) / self.size)

    def keys(self, epoch: int) -> list[list[Key]]:
        """Return the batches of one epoch; the last one may be short."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.prepared), generator=generator).tolist()
        return [[(epoch, row) for row in order[i : i + self.size]] for i in range(0, len(order), self.size)]

    def read(self, keys: Iterable[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (rows, channels, height, width), class indices (rows) int64) of each batch."""
        return self.prepared.batches(keys, self.workers, self.pin)
