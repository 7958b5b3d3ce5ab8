"""Dropout that keeps no mask: the random state it drew from is kept, and backward draws the same masks again.

The numbers are those that nn.Dropout would have drawn from the same state, so a model trains as it does with PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def random_state(device: torch.device) -> torch.Tensor:
    """Return the state of the generator that dropout on this device draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def noises(
    x: torch.Tensor, probabilities: Sequence[float], dtype: torch.dtype, state: torch.Tensor | None = None
) -> list[torch.Tensor | None]:
    """Return what one dropout after the other multiplies x by: 0 with probability p, else 1 / (1 - p).

    Args:
        x: any shape; only its shape, strides and device matter.
        probabilities: one for each; a probability of 0 draws nothing and gives None.
        dtype: of the results.
        state: draw from this state and leave the generator as it is; None draws from the generator itself.
    """
    if state is None:
        return [F.dropout(torch.ones_like(x, dtype=dtype), p) if p else None for p in probabilities]
    now = random_state(x.device)
    _set_state(x.device, state)
    try:
        return noises(x, probabilities, dtype)
    finally:
        _set_state(x.device, now)


def _set_state(device: torch.device, state: torch.Tensor) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
