"""The usual call: one linear layer, one adapter, no dropout. `linear` computes the same for everything else.

A model calls this hundreds of times a step, and on a GPU small layers wait for Python. So here is nothing but the
products: scalings ride in them (alpha), and nothing is cast, stacked or split that need not be.
"""

from __future__ import annotations

from typing import Any

import torch

from . import lowrank
from .autocast import cast, no_autocast
from .differentiable import once_differentiable
from .frozen import FrozenWeight
from .linear import split_product


def single_linear(
    x: torch.Tensor,
    weight: FrozenWeight,
    merged: bool,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    base: torch.dtype,
    low: torch.dtype,
    output: torch.dtype,
) -> torch.Tensor:
    """Return x W^T + bias + scaling * (x A^T) B^T, as `linear.lora_linear` does for a group of one.

    Args:
        x: (..., in), any float dtype.
        weight: how W (out, in) is read; merged: the update is put into it.
        merged: see `linear.Member`.
        bias: (out,) or None.
        a: (rank, in).
        b: (out, rank).
        scaling: factor of the update.
        base: dtype of the large products.
        low: dtype of the low-rank ones.
        output: dtype of the result.
    """
    settings = (weight, merged, scaling, base, low, output)
    return _Single.apply(x, settings, weight.kept, bias, a, b)  # type: ignore[return-value]


class _Single(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        settings: Any,
        kept: torch.Tensor | None,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
    ) -> torch.Tensor:
        ctx.settings, ctx.dtype, ctx.factor_dtype = settings, x.dtype, a.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        with no_autocast(x.device.type):
            return _forward(ctx, x, kept, bias, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        with no_autocast(dy.device.type):
            return _backward(ctx, dy)


def _forward(
    ctx: Any,
    x: torch.Tensor,
    kept: torch.Tensor | None,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
) -> torch.Tensor:
    weight, merged, scaling, base, low, output = ctx.settings
    if x.dtype is not base and low is base and x.element_size() > base.itemsize:
        x = x.to(base)  # what all products take, and half of what autograd would keep
    shape = x.shape
    rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    if merged:
        ctx.save_for_backward(x, None, a, b, kept)
        w = weight.merged(base, a, b, scaling, low).t()
        rows = cast(rows, base)
        y = rows @ w if bias is None else torch.addmm(cast(bias, base), rows, w)
    else:
        low_a, low_b = cast(a, low), cast(b, low)
        h = lowrank.down(rows, low_a)
        # Casts of the factors are as small as h: kept, they need not be made again.
        ctx.save_for_backward(x, h, low_a, low_b, kept)
        bias = None if bias is None else cast(bias, base)
        y = split_product(cast(rows, base), weight.read(base).t(), bias, h, low_b, scaling)
    y = cast(y, output)
    # Not a view for autograd, which would forbid to write to it (an activation in place).
    return y if len(shape) == 2 else torch.ops.aten._unsafe_view.default(y, (*shape[:-1], y.shape[1]))


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, merged, scaling, base, low, _ = ctx.settings
    x, h, a, b, _ = ctx.saved_tensors
    wants_x, _, _, wants_bias, wants_a, wants_b = ctx.needs_input_grad
    shape = x.shape
    rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    dys = dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1])
    low_a, low_b = cast(a, low), cast(b, low)
    dx = dh = da = db = None
    if wants_a or wants_b:
        h = lowrank.down(rows, low_a) if h is None else h
        dh, db = lowrank.up_gradients(dys, h, low_b, scaling, ctx.factor_dtype)
        da = lowrank.down_gradient(dh, rows, ctx.factor_dtype)
    if wants_x:
        if merged:
            dx = cast(dys, base) @ weight.merged(base, a, b, scaling, low)
        else:
            dh = lowrank.product(cast(dys, low), low_b, scaling) if dh is None else dh
            dx = lowrank.up(dh, low_a.t(), None, base).addmm_(cast(dys, base), weight.read(base))
        dx = cast(dx, ctx.dtype)
        dx = dx if len(shape) == 2 else dx.view(shape)
    dbias = cast(dys.sum(0), ctx.bias_dtype) if wants_bias else None
    return dx, None, None, dbias, da, db
