"""The effective weight itself, W + sum_i s_i B_i A_i (arXiv 2106.09685, eq. 3), for code that wants its values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .autocast import no_autocast
from .frozen import FrozenWeight


def effective_weight(
    weight: FrozenWeight, factors: Sequence[torch.Tensor], scalings: Sequence[Any], dtype: torch.dtype
) -> torch.Tensor:
    """Return W + sum_i s_i B_i A_i in W's shape. Autograd can look on: it keeps the factors, and nothing of W's size.

    Args:
        weight: how W (out, in) or (out, in / groups, *kernel) is read.
        factors: A (rank, in / groups, *kernel) and B (out, rank, 1...) of every adapter, in order.
        scalings: one factor an adapter, a number or a tensor of one value.
        dtype: of the result; the sum is taken in fp32 at least and rounded once.
    """
    wide = torch.promote_types(dtype, torch.float32)
    total = weight.read(wide)
    with no_autocast(total.device.type):
        for i, scaling in enumerate(scalings):
            a, b = factors[2 * i].to(wide).flatten(1), factors[2 * i + 1].to(wide).flatten(1)
            total = total + (b @ a * scaling).view(total.shape)
    return total.to(dtype)


def effective_gradients(
    gradient: torch.Tensor, factors: Sequence[torch.Tensor], scalings: Sequence[float]
) -> list[torch.Tensor]:
    """Return the gradients of the factors for that of the effective weight: dA = s B^T dW, dB = s dW A^T."""
    found: list[torch.Tensor] = []
    wide = torch.promote_types(gradient.dtype, torch.float32)
    with no_autocast(gradient.device.type):
        dw = gradient.to(wide).flatten(1)
        for i, scaling in enumerate(scalings):
            a, b = factors[2 * i], factors[2 * i + 1]
            da = b.to(wide).flatten(1).t() @ dw * scaling
            db = dw @ a.to(wide).flatten(1).t() * scaling
            found += [da.view(a.shape).to(a.dtype), db.view(b.shape).to(b.dtype)]
    return found
