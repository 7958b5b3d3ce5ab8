"""What is random about an image in a step follows from numbers (the seed, the step, ...) and from nothing else.

So a resumed run, and one that splits its batches in another way, sees the same noise and the same timesteps. All is drawn on
the CPU, whose generator is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: For one image: the seed, the step, the micro-batch, the index in it, or whatever else tells it from all others.
Numbers = tuple[int, ...]
#: What is drawn for an image; each is independent of the others.
POSTERIOR, LEVEL, NOISE, OFFSET = 1, 2, 3, 4


def generator_for(purpose: int, numbers: Numbers) -> torch.Generator:
    """Return a generator of the CPU that begins from a purpose and numbers, all at least 0."""
    # The length too: SeedSequence takes zeros at the end for nothing.
    state = np.random.SeedSequence((purpose, len(numbers), *numbers)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def normal(shape: Sequence[int], purpose: int, numbers: Sequence[Numbers]) -> Tensor:
    """Return standard normal noise (len(numbers), *shape) float32 on the CPU, each row from its own numbers."""
    return torch.stack([torch.randn(tuple(shape), generator=generator_for(purpose, row)) for row in numbers])


def uniform(purpose: int, numbers: Sequence[Numbers]) -> Tensor:
    """Return (len(numbers),) float32 on the CPU, uniform in [0, 1), each from its own numbers."""
    return torch.cat([torch.rand(1, generator=generator_for(purpose, row)) for row in numbers])


def posterior_noise(like: Tensor, numbers: Sequence[Numbers]) -> Tensor:
    """Return the noise that draws latents from the VAE's posterior, of the shape and device of its mean (B, C, h, w)."""
    return normal(like.shape[1:], POSTERIOR, numbers).to(like.device)
