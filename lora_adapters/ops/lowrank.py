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
        return _narrow(x, a)
    step = _rows(x)
    if step >= x.shape[0]:
        return _narrow(x.to(a.dtype), a)
    h = x.new_empty((x.shape[0], a.shape[0]), dtype=a.dtype)
    for start in range(0, x.shape[0], step):
        h[start : start + step] = _narrow(x[start : start + step].to(a.dtype), a)
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
    # (h^T dy)^T and not dy^T h: on CPUs the wide operand is better not the transposed one, by a factor of 2 to 10.
    if dy.dtype == h.dtype:
        return _narrow(dy, b.t()), (h.t() @ dy).t()
    step = _rows(dy)
    if step >= dy.shape[0]:
        wide = dy.to(h.dtype)
        return _narrow(wide, b.t()), (h.t() @ wide).t()
    dh, db = torch.empty_like(h), h.new_zeros((b.shape[1], b.shape[0]))
    for start in range(0, dy.shape[0], step):
        wide = dy[start : start + step].to(h.dtype)
        dh[start : start + step] = _narrow(wide, b.t())
        db.addmm_(h[start : start + step].t(), wide)
    return dh, db.t()


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


def _narrow(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return x @ a^T for a few rows of a. In fp32 MKL takes twice as long or more where they don't fill vectors of 16."""
    if x.device.type == "cpu" and x.dtype is torch.float32 and a.shape[0] % 16:
        return (a @ x.t()).t()
    return x @ a.t()


def _rows(x: torch.Tensor) -> int:
    return max(1, _SLICE // max(1, x.shape[1]))
