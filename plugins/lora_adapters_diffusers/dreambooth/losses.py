"""From a batch to the loss of each of its images, in training and at fixed noise levels.

All that is drawn or read on the CPU comes first, in `drawn`: what follows can be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_adapters.modes import modes_kept

from .family import Family
from .noise import Numbers, posterior_noise
from .objective import Noised, Objective

#: Before the names of what the denoiser is told of the text.
_TEXT = "text "


@dataclass(frozen=True)
class Batch:
    """Images of one size as training sees them.

    Attributes:
        moments: what `Family.moments` or `CachedLatents.moments` returned.
        text: what `Family.encode`, `encode_each` or `CachedText.encode` returned.
        sizes: (B, 6), see `Family.predict`.
        mask: (B, 1, H, W) in [0, 1], what the loss counts where; None: 1 everywhere.
    """

    moments: dict[str, Tensor]
    text: dict[str, Tensor]
    sizes: Tensor
    mask: Tensor | None = None


def sizes_of(examples: Sequence[Any]) -> Tensor:
    """Return (B, 6) int64 of examples with `original`, `crop` and `target`: see `Family.predict`."""
    return torch.tensor([[*example.original, *example.crop, *example.target] for example in examples])


def masks_of(examples: Sequence[Any]) -> Tensor | None:
    """Return (B, 1, H, W) of examples with `mask`, which counts everywhere where one has none; None where none has."""
    masks = [example.mask for example in examples]
    like = next((mask for mask in masks if mask is not None), None)
    return None if like is None else torch.stack([torch.ones_like(like) if mask is None else mask for mask in masks])


def drawn(family: Family, objective: Objective, batch: Batch, numbers: Sequence[Numbers]) -> dict[str, Tensor | None]:
    """Return what `losses` takes: the batch at drawn noise levels; see `Objective.noised` for the numbers."""
    return _inputs(batch, objective.noised(_latents(family, batch, numbers), numbers))


def losses(family: Family, objective: Objective, inputs: Mapping[str, Tensor | None]) -> Tensor:
    """Return each image's loss (B,) float32 of what `drawn` returned."""
    given = {name: value for name, value in inputs.items() if value is not None}
    text = {name.removeprefix(_TEXT): value for name, value in given.items() if name.startswith(_TEXT)}
    predicted = family.predict(given["noisy"], given["timesteps"], text, given["sizes"])
    return objective.loss(predicted, given["target"], given["weight"], inputs["mask"])


@torch.no_grad()
def eval_losses(
    family: Family, objective: Objective, batch: Batch, numbers: Sequence[Numbers], points: int = 8
) -> Tensor:
    """Return each image's mean loss (B,) float32 at evenly spread noise levels, always the same for the same numbers.

    The denoiser is in evaluation mode, and afterwards in the mode that it was in.

    Args:
        family, objective, batch: as for `losses`.
        numbers: of each image, such as (seed, its number).
        points: levels, from image to noise: (k + 1/2) / points.
    """
    latents = _latents(family, batch, numbers)
    total = torch.zeros(len(latents), device=latents.device)
    with modes_kept(family.denoiser):
        family.denoiser.eval()
        for point in range(points):
            levels = torch.full((len(latents),), (point + 0.5) / points)
            noised = objective.noised_at(latents, levels, [(*row, point) for row in numbers])
            total += losses(family, objective, _inputs(batch, noised))
    return total / points


def _latents(family: Family, batch: Batch, numbers: Sequence[Numbers]) -> Tensor:
    device = next(family.denoiser.parameters()).device
    moments = {name: value.to(device) for name, value in batch.moments.items()}
    return family.sample(moments, posterior_noise(moments["mean"], numbers))


def _inputs(batch: Batch, noised: Noised) -> dict[str, Tensor | None]:
    text = {_TEXT + name: value for name, value in batch.text.items()}
    return {**noised._asdict(), **text, "sizes": batch.sizes, "mask": batch.mask}
