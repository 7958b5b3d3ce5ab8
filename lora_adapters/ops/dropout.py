"""Dropout that keeps no mask: the random state it drew from is kept, and backward draws the same masks again.
A CUDA graph is the exception: its recording can't read the state, and keeps the masks.

On the CPU the numbers are those that nn.Dropout would have drawn from the same state, so a model trains as it does with
PEFT. (On a GPU torch's dropout has a kernel of its own that takes no generator: there they are other numbers.) A mask
is 0 and 1, exact in any dtype; the 1 / (1 - p) goes with the adapter's scaling (`kept_scalings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

Masks = list[torch.Tensor | None]


class Draw(NamedTuple):
    """What it takes to draw the same masks again, whatever became of the input's strides in between.

    Attributes:
        shape, strides, dtype, device: of each mask.
        probabilities: one for each; a probability of 0 draws nothing and gives None.
        state: of the generator; None where there are no values (simulated tensors), or masks are kept.
        masks: the masks themselves, where the state can't be read.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    probabilities: tuple[float, ...]
    state: torch.Tensor | None
    masks: Masks | None = None

    def again(self) -> Masks:
        """Return the masks that `draw_masks` returned. The device's generator stays as it is."""
        return self._drawn()[0] if self.masks is None else self.masks

    def _drawn(self) -> tuple[Masks, torch.Generator | None]:
        """Return the masks and the generator that drew them."""
        own = None
        if self.state is not None:
            # The device's own generator won't do: another thread may use it between any two steps here.
            own = torch.Generator(self.device)
            own.set_state(self.state)
        masks: Masks = []
        for p in self.probabilities:
            mask = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device) if p else None
            if mask is not None:
                mask = mask.zero_() if p == 1 else mask.bernoulli_(1 - p, generator=own)
            masks.append(mask)
        return masks, own


def draw_masks(x: torch.Tensor, probabilities: Sequence[float], dtype: torch.dtype) -> tuple[Masks, Draw]:
    """Return what one dropout after the other multiplies x by: 0 with probability p, else 1.

    Args:
        x: any shape, on the CPU or a CUDA device; only its shape, strides and device matter.
        probabilities: one for each; a probability of 0 draws nothing and gives None.
        dtype: of the results.

    Returns:
        The masks, and what draws them again.
    """
    strides = torch.empty_like(x, device="meta").stride()  # dense, in the order of x's own, as dropout makes them
    simulated, state = type(x) is FakeTensor or x.device.type == "meta", None
    recorded = not simulated and x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not simulated and not recorded:
        state = torch.cuda.get_rng_state(x.device) if x.device.type == "cuda" else torch.get_rng_state()
    draw = Draw(tuple(x.shape), strides, dtype, x.device, tuple(probabilities), state)
    masks, own = draw._drawn()
    if own is not None:
        after = own.get_state()
        torch.cuda.set_rng_state(after, x.device) if x.device.type == "cuda" else torch.set_rng_state(after)
    return masks, draw._replace(masks=masks) if recorded else draw


def kept_scalings(scalings: tuple[float, ...], probabilities: Sequence[float]) -> tuple[float, ...]:
    """Return each scaling over the probability that an input is kept. `probabilities` may be empty: nothing drops."""
    if not probabilities:
        return scalings
    return tuple(s if p == 1 else s / (1 - p) for s, p in zip(scalings, probabilities, strict=True))
