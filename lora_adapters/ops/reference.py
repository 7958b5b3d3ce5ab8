"""What a LoRA layer computes, written so that it can be checked by reading. Slow; the oracle of every test.

    y = f(x, W) + bias + sum_i s_i * f_B(f_A(dropout_i(x), A_i), B_i)        (arXiv 2106.09685, eq. 3)

with f the layer's own operation. Where dropout is off this is f(x, W + sum_i s_i * B_i @ A_i) + bias: the effective
weight. Everything is differentiable by autograd; give float64 tensors for an exact answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

#: A, B and scaling of one adapter, and the mask that multiplies its input (None: no dropout).
Term = tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: Sequence[Term]) -> torch.Tensor:
    """x (..., in), weight (out, in), A (rank, in), B (out, rank) -> (..., out)."""
    y = F.linear(x, weight, bias)
    for a, b, scaling, mask in terms:
        y = y + F.linear(F.linear(x if mask is None else x * mask, a), b) * scaling
    return y


def conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: Sequence[Term], **geometry: Any
) -> torch.Tensor:
    """x (batch, in, *size), weight (out, in / groups, *kernel), A (rank, in / groups, *kernel), B (out, rank, 1...).

    All groups share A, so the update B @ A has the weight's own shape; geometry is stride, padding, dilation, groups.
    """
    op = {3: F.conv1d, 4: F.conv2d}[weight.dim()]
    y = op(x, weight, bias, **geometry)
    for a, b, scaling, mask in terms:
        update = (b.flatten(1) @ a.flatten(1)).view_as(weight)
        y = y + op(x if mask is None else x * mask, update, None, **geometry) * scaling
    return y


def embedding(index: torch.Tensor, weight: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """Index (any shape), weight (rows, dim), A (rank, rows), B (dim, rank) -> (*index, dim). There is no dropout."""
    y = F.embedding(index, weight)
    for a, b, scaling, _ in terms:
        y = y + F.embedding(index, a.t()) @ b.t() * scaling
    return y
