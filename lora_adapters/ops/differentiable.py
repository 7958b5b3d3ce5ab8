"""torch's once_differentiable, which takes longer than the smallest layers, only where its care is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import function

Backward = Callable[..., tuple[Any, ...]]


def once_differentiable(backward: Backward) -> Backward:
    """Mark a backward whose result can't be differentiated again. Trying to raises a RuntimeError, as torch's does."""
    careful = function.once_differentiable(backward)

    def chosen(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        # Grad mode is on in a backward only if its result is to be differentiated (create_graph=True).
        return careful(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return chosen
