"""Dropout that keeps no mask: the random state it drew from is kept, and backward draws the same masks again.

The numbers are those that nn.Dropout would have drawn from the same state, so a model trains as it does with PEFT. A
mask is 0 and 1, exact in any dtype; the 1 / (1 - p) goes with the adapter's scaling (`kept_scalings`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

#: Held while the generator of a GPU is set back and forth. On the CPU a generator of our own draws instead.
_LOCK = threading.Lock()

Masks = list[torch.Tensor | None]


class Draw(NamedTuple):
    """What it takes to draw the same masks again, whatever became of the input's strides in between.

    Attributes:
        shape, strides, dtype, device: of each mask.
        probabilities: one for each; a probability of 0 draws nothing and gives None.
        state: of the generator before.
        after: and after, on a GPU: a difference shows that another thread drew in between.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    probabilities: tuple[float, ...]
    state: torch.Tensor | None = None
    after: torch.Tensor | None = None

    def again(self) -> Masks:
        """Return the masks that `draw_masks` returned, and leave the generator as it is.

        Raises:
            RuntimeError: another thread drew random numbers on the same GPU while this one did.
        """
        if self.device.type == "cuda" and self.state is not None:
            return self._again_on_gpu(self.state)
        masks, _ = self._drawn(self.state)
        return masks

    def _again_on_gpu(self, state: torch.Tensor) -> Masks:
        with _LOCK:
            now = torch.cuda.get_rng_state(self.device)
            torch.cuda.set_rng_state(state, self.device)
            masks = self._global()
            after = torch.cuda.get_rng_state(self.device)
            torch.cuda.set_rng_state(now, self.device)
        if self.after is None or not torch.equal(after, self.after):
            raise RuntimeError(
                "Another thread drew random numbers on this GPU during dropout, so its masks can't be drawn again. "
                "Run one thread per GPU, or set layer.fused = False."
            )
        return masks

    def _global(self) -> Masks:
        ones = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device).fill_(1)
        return [F.dropout(ones, p).sign_() if p else None for p in self.probabilities]

    def _drawn(self, state: torch.Tensor | None) -> tuple[Masks, torch.Tensor | None]:
        """Return masks drawn from `state` by a generator of our own, and its state afterwards."""
        if state is None:
            return self._global(), None
        # The global one may be used by other threads between any two steps here.
        own = torch.Generator("cpu")
        own.set_state(state)
        masks: Masks = []
        for p in self.probabilities:
            mask = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device) if p else None
            if mask is not None:
                mask = mask.zero_() if p == 1 else mask.bernoulli_(1 - p, generator=own)
            masks.append(mask)
        return masks, own.get_state()


def draw_masks(x: torch.Tensor, probabilities: Sequence[float], dtype: torch.dtype) -> tuple[Masks, Draw]:
    """Return what one dropout after the other multiplies x by: 0 with probability p, else 1.

    Args:
        x: any shape; only its shape, strides and device matter.
        probabilities: one for each; a probability of 0 draws nothing and gives None.
        dtype: of the results.

    Returns:
        The masks, and what draws them again.
    """
    strides = torch.empty_like(x, device="meta").stride()  # dense, in the order of x's own, as dropout makes them
    draw = Draw(tuple(x.shape), strides, dtype, x.device, tuple(probabilities))
    if type(x) is FakeTensor or x.device.type not in ("cpu", "cuda"):
        return draw._global(), draw  # nothing but shapes
    if x.device.type == "cuda":
        with _LOCK:
            state = torch.cuda.get_rng_state(x.device)
            masks = draw._global()
            after = torch.cuda.get_rng_state(x.device)
        return masks, draw._replace(state=state, after=after)
    state = torch.get_rng_state()
    masks, end = draw._drawn(state)
    assert end is not None
    torch.set_rng_state(end)
    return masks, draw._replace(state=state)


def kept_scalings(scalings: tuple[float, ...], probabilities: Sequence[float]) -> tuple[float, ...]:
    """Return each scaling over the probability that an input is kept. `probabilities` may be empty: nothing drops."""
    if not probabilities:
        return scalings
    return tuple(s if p == 1 else s / (1 - p) for s, p in zip(scalings, probabilities, strict=True))
