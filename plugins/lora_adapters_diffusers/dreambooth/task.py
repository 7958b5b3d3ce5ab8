"""What the training loop asks for: batches of the subject and its class, and their loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lora_adapters.runs.stopping import leave_signals

from .batches import Batches, Example, Key
from .caches import CachedLatents, CachedText, encode_each
from .family import Family
from .losses import Batch, drawn, eval_losses, losses, masks_of, sizes_of
from .objective import Objective


@dataclass(frozen=True)
class Ready:
    """Images of one size, read.

    Attributes:
        keys: of the images.
        examples: what `Batches.example` returned; of cached images without pixels.
    """

    keys: list[Key]
    examples: list[Example]


class Task:
    """Images, captions and what is made of them; see `lora_adapters.runs.loop.Batches`.

    Args:
        family, objective: of the pipeline.
        batches: the images.
        latents, text: caches that hold all of them; None encodes at each step.
        trained: gradients flow to the text encoders.
        prior_weight: weight of the loss of the images of the class.
        seed: noise and timesteps of an image follow from it and from the image's key.
        workers: processes that read images.
    """

    def __init__(
        self,
        family: Family,
        objective: Objective,
        batches: Batches,
        *,
        latents: CachedLatents | None,
        text: CachedText | None,
        trained: bool,
        prior_weight: float,
        seed: int,
        workers: int,
    ) -> None:
        self.family, self.objective, self.batches = family, objective, batches
        self.latents, self.text, self.trained = latents, text, trained
        self.prior_weight, self.seed, self.workers = prior_weight, seed, workers
        self._masks: dict[str, Tensor | None] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def keys(self, epoch: int) -> list[list[Key]]:
        """Return the batches of one pass over the images of the subject."""
        return self.batches.keys(epoch)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def fill(self, epochs: int) -> None:
        """Fill the caches with all that so many passes take."""
        if self.latents is not None:
            new: dict[str, Key] = {}
            for key in itertools.chain.from_iterable(batch for e in range(epochs) for batch in self.keys(e)):
                new.setdefault(self.batches.fingerprint(key), key)
            self.latents.fill((name, self._example_to_cache(name, key).pixels) for name, key in new.items())
        if self.text is not None:
            self.text.fill(self.batches.captions())

    def _example_to_cache(self, name: str, key: Key) -> Example:
        example = self.batches.example(key)
        self._masks[name] = example.mask
        return example

    def read(self, keys: Iterable[list[Key]]) -> Iterator[Ready]:
        """Yield the batch of each list of keys."""
        if self.latents is not None:
            yield from (Ready(batch, [self._cached(key) for key in batch]) for batch in keys)
            return
        mine, theirs = itertools.tee(keys)
        loader: Any = DataLoader(
            self.batches,
            batch_sampler=theirs,  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=list,
            worker_init_fn=leave_signals,
            generator=torch.Generator(),  # else each loader takes a number from the generator that dropout draws from
        )
        yield from (Ready(batch, examples) for batch, examples in zip(mine, loader, strict=True))

    def _cached(self, key: Key) -> Example:
        item, view = self.batches.item(key), self.batches.view(key)
        mask = self._masks[self.batches.fingerprint(key)]
        original = item.size[1], item.size[0]
        return Example(torch.empty(0), mask, self.batches.caption(key), original, view.crop, view.target, item.prior)

    # ---- losses ------------------------------------------------------------------------------------------------------

    def inputs(self, ready: Ready, step: int, number: int) -> dict[str, Tensor | None]:
        """Return what `loss` takes: images with noise, and what each image's loss counts.

        DreamBooth's objective (arXiv:2208.12242, eq. 2): the mean over the images of the subject, and the weighted mean
        over those of the class.
        """
        found = drawn(self.family, self.objective, self._batch(ready), [(self.seed, *key) for key in ready.keys])
        prior = torch.tensor([example.prior for example in ready.examples])
        share = torch.where(prior, self.prior_weight / max(1, int(prior.sum())), 1 / int((~prior).sum()))
        return {**found, "share": share}

    def loss(self, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """Return the loss () of what `inputs` returned."""
        found, share = losses(self.family, self.objective, inputs), inputs["share"]
        assert share is not None
        return (found * share.to(found)).sum()

    def measure(self) -> float:
        """Return the mean loss over all images at fixed noise levels."""
        found = [
            eval_losses(self.family, self.objective, self._batch(ready), [(self.seed, *key) for key in ready.keys])
            for ready in self.read(self.keys(0))
        ]
        return float(torch.cat(found).double().mean())

    def _batch(self, ready: Ready) -> Batch:
        examples = ready.examples
        if self.latents is not None:
            moments = self.latents.moments([self.batches.fingerprint(key) for key in ready.keys])
        else:
            moments = self.family.moments(torch.stack([example.pixels for example in examples]))
        return Batch(moments, self._told([e.caption for e in examples]), sizes_of(examples), masks_of(examples))

    def _told(self, captions: Sequence[str]) -> dict[str, Tensor]:
        if self.text is not None:
            return self.text.encode(captions)
        return self.family.encode(captions) if self.trained else encode_each(self.family, captions)
