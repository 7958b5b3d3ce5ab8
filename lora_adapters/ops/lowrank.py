"""The skinny products of LoRA's forward and backward. Each reads its large operand once and makes no large copy of it.

On CUDA they are the Triton kernels; elsewhere torch's products. Where the large operand's dtype is not the one to
compute in (a 16-bit input under fp32 factors) it is converted a slice at a time.
"""

from __future__ import annotations

import torch

from . import kernels

#: Rows of the large operand that are converted at a time: a slice of this many values stays in a CPU's cache.
_SLICE = 1 << 20


def down(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """x (tokens, in), a (rank, in) -> x @ a^T (tokens, rank) in a's dtype."""
    if kernels.available(x.device, x.dtype, a.dtype):
        return kernels.down(x, a, a.dtype)
    if x.dtype == a.dtype:
        return x @ a.t()
    step = _rows(x)
    if step >= x.shape[0]:
        return x.to(a.dtype) @ a.t()
    h = x.new_empty((x.shape[0], a.shape[0]), dtype=a.dtype)
    for start in range(0, x.shape[0], step):
        torch.mm(x[start : start + step].to(a.dtype), a.t(), out=h[start : start + step])
    return h


def up_gradients(dy: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of h and b for y = h @ b^T.

    Args:
        dy: (tokens, out), any dtype.
        h: (tokens, rank).
        b: (out, rank), of h's dtype.

    Returns:
        dy @ b (tokens, rank) in h's dtype, and dy^T @ h (out, rank) in h's dtype or fp32.
    """
    if kernels.available(dy.device, dy.dtype, h.dtype):
        return kernels.up_grads(dy, h, b, 1.0)
    if dy.dtype == h.dtype:
        return dy @ b, dy.t() @ h
    step = _rows(dy)
    if step >= dy.shape[0]:
        wide = dy.to(h.dtype)
        return wide @ b, wide.t() @ h
    dh, db = torch.empty_like(h), torch.zeros_like(b)
    for start in range(0, dy.shape[0], step):
        wide = dy[start : start + step].to(h.dtype)
        torch.mm(wide, b, out=dh[start : start + step])
        db.addmm_(wide.t(), h[start : start + step])
    return dh, db


def down_gradient(dh: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dh (tokens, rank), x (tokens, in) of any dtype -> dh^T @ x (rank, in) in dh's dtype or fp32."""
    if kernels.available(x.device, x.dtype, dh.dtype):
        return kernels.down_grad(dh, x)
    if x.dtype == dh.dtype:
        return dh.t() @ x
    step = _rows(x)
    if step >= x.shape[0]:
        return dh.t() @ x.to(dh.dtype)
    da = dh.new_zeros((dh.shape[1], x.shape[1]))
    for start in range(0, x.shape[0], step):
        da.addmm_(dh[start : start + step].t(), x[start : start + step].to(dh.dtype))
    return da


def _rows(x: torch.Tensor) -> int:
    return max(1, _SLICE // max(1, x.shape[1]))
