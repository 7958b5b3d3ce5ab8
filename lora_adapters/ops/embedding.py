"""LoRA on an embedding: y[i] = base[i] + sum_j s_j A_j[:, i]^T B_j^T, gathered without a transposed copy of A."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .autocast import no_autocast
from .differentiable import once_differentiable
from .factors import Stack


def lora_embedding(
    result: torch.Tensor,
    index: torch.Tensor,
    factors: Sequence[torch.Tensor],
    scalings: Sequence[float],
    dtype: torch.dtype,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """Return result + the update of the rows `index`, in the wider of the two dtypes.

    Args:
        result: (*index, dim), the base's rows.
        index: any shape, integers.
        factors: A (rank, rows) and B (dim, rank) of every adapter, in order.
        scalings: one factor an adapter.
        dtype: to compute the update in.
        padding_idx: this row gives A no gradient, as in torch.nn.functional.embedding.
    """
    return _Embedding.apply(result, index, tuple(scalings), dtype, padding_idx, *factors)  # type: ignore[return-value]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        index: torch.Tensor,
        scalings: tuple[float, ...],
        dtype: torch.dtype,
        *rest: Any,
    ) -> torch.Tensor:
        padding_idx, *factors = rest  # not named for the reason in `conv`
        ctx.scalings, ctx.dtype, ctx.padding_idx, ctx.base = scalings, dtype, padding_idx, result.dtype
        ctx.save_for_backward(index, *factors)
        with no_autocast(result.device.type):
            stack = Stack(factors, scalings, dtype)
            update = stack.scaled(stack.a.index_select(1, index.reshape(-1)).t()) @ stack.b.t()
            return result + update.view(result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (dy,) = gradients
        index, *factors = ctx.saved_tensors
        with no_autocast(dy.device.type):
            stack = Stack(factors, ctx.scalings, ctx.dtype)
            flat, rows = index.reshape(-1), dy.reshape(-1, dy.shape[-1]).to(ctx.dtype)
            h = stack.a.index_select(1, flat)
            db = rows.t() @ h.t()
            dh = stack.scaled(rows @ stack.b).t()
            if ctx.padding_idx is not None:
                dh = dh * (flat != ctx.padding_idx)
            # A row that occurs often: in 16 bits a sum of many terms stops growing.
            wide = torch.promote_types(ctx.dtype, torch.float32)
            da = torch.zeros_like(stack.a, dtype=wide).index_add_(1, flat, dh.to(wide))
            own = stack.gradients(da, db)
        return (dy.to(ctx.base) if ctx.needs_input_grad[0] else None, None, None, None, None, *own)
