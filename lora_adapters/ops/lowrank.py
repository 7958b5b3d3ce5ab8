"""The skinny products of LoRA's forward and backward. Each reads its large operand once and makes no large copy of it.

Who computes them:
    operands of one dtype: torch's products. They are bound by memory as any kernel of ours would be, and quicker to
        launch. On CUDA results that are wanted in fp32 are written so by the product. The exception is `up_gradients`
        of a very large dy on CUDA, which one kernel reads once for both (`kernels.up_grads_pays`);
    operands of different dtypes (16-bit x or dy under fp32 factors): on CUDA the Triton kernels, elsewhere torch's
        products, for which the large operand is converted a slice at a time.
"""

from __future__ import annotations

import torch

from . import kernels
from .autocast import cast

#: Rows of the large operand that are converted at a time: a slice of this many values stays in a CPU's cache.
_SLICE = 1 << 20


def down(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """x (tokens, in), a (rank, in) -> x @ a^T (tokens, rank) in a's dtype."""
    if x.dtype is a.dtype:
        return _narrow(x, a)
    if kernels.available(x.device, x.dtype, a.dtype):
        return kernels.down(x, a, a.dtype)
    step = _rows(x)
    if step >= x.shape[0]:
        return _narrow(x.to(a.dtype), a)
    h = x.new_empty((x.shape[0], a.shape[0]), dtype=a.dtype)
    for start in range(0, x.shape[0], step):
        h[start : start + step] = _narrow(x[start : start + step].to(a.dtype), a)
    return h


def up(
    h: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, scaling: float = 1.0
) -> torch.Tensor:
    """Return scaling * h @ b^T + bias as a new tensor.

    Args:
        h: (tokens, rank).
        b: (out, rank), of h's dtype; the transpose of a (rank, out) matrix is as good.
        bias: (out,) of `dtype`, or None. It is added before the result is rounded, or after it, never rounded itself.
        dtype: of the result (tokens, out). A large copy of it in a wider dtype is made where there are no kernels.
        scaling: factor of the product.
    """
    if h.dtype is not dtype and kernels.available(h.device, h.dtype, b.dtype, dtype):
        return kernels.up(h, b, bias, dtype, scaling)
    if bias is not None and torch.promote_types(h.dtype, dtype) is h.dtype:
        return cast(torch.addmm(cast(bias, h.dtype), h, b.t(), alpha=scaling), dtype)
    y = cast(product(h, b.t(), scaling), dtype)
    return y if bias is None else y.add_(bias)


def add_up(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """Add scaling * h @ b^T to y (tokens, out) in place and return it: summed in the wider dtype, rounded once.

    h (tokens, rank) and b (out, rank) are of one dtype, y of any. No derivative unless all are of one.
    """
    if h.dtype is y.dtype:
        return y.addmm_(h, b.t(), alpha=scaling)
    if kernels.available(y.device, y.dtype, h.dtype, b.dtype) and y.is_contiguous():
        return kernels.add_up(y, h, b, scaling)
    return y.add_(product(h, b.t(), scaling))


def up_gradients(
    dy: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scaling: float = 1.0, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of h and b for y = scaling * h @ b^T.

    Args:
        dy: (tokens, out), any dtype.
        h: (tokens, rank).
        b: (out, rank), of h's dtype.
        scaling: factor of both.
        dtype: of the gradient of b; None means h's, or fp32 where that is as quick.

    Returns:
        scaling * dy @ b (tokens, rank) in h's dtype, and scaling * dy^T @ h (out, rank) in `dtype`.
    """
    dtype = dtype or _gradient_dtype(h)
    if kernels.available(dy.device, dy.dtype, h.dtype) and (dy.dtype is not h.dtype or kernels.up_grads_pays(dy, h)):
        dh, db = kernels.up_grads(dy, h, b, scaling)
        return dh, cast(db, dtype)
    if dy.is_cuda and dy.dtype is h.dtype:
        return product(dy, b, scaling), product(dy.t(), h, scaling, dtype)
    # (h^T dy)^T and not dy^T h: on CPUs the wide operand is better not the transposed one, by a factor of 2 to 10.
    if dy.dtype is h.dtype:
        return _narrow(dy, b.t(), scaling), product(h.t(), dy, scaling, dtype).t()
    step = _rows(dy)
    if step >= dy.shape[0]:
        wide = dy.to(h.dtype)
        return _narrow(wide, b.t(), scaling), product(h.t(), wide, scaling, dtype).t()
    dh, db = torch.empty_like(h), h.new_zeros((b.shape[1], b.shape[0]))
    for start in range(0, dy.shape[0], step):
        wide = dy[start : start + step].to(h.dtype)
        dh[start : start + step] = _narrow(wide, b.t(), scaling)
        db.addmm_(h[start : start + step].t(), wide, alpha=scaling)
    return dh, cast(db.t(), dtype)


def down_gradient(dh: torch.Tensor, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """dh (tokens, rank), x (tokens, in) of any dtype -> dh^T @ x (rank, in) in `dtype`; None: see up_gradients."""
    dtype = dtype or _gradient_dtype(dh)
    if x.dtype is dh.dtype:
        return product(dh.t(), x, 1.0, dtype)
    if kernels.available(x.device, x.dtype, dh.dtype):
        return cast(kernels.down_grad(dh, x), dtype)
    step = _rows(x)
    if step >= x.shape[0]:
        return product(dh.t(), x.to(dh.dtype), 1.0, dtype)
    da = dh.new_zeros((dh.shape[1], x.shape[1]))
    for start in range(0, x.shape[0], step):
        da.addmm_(dh[start : start + step].t(), x[start : start + step].to(dh.dtype))
    return cast(da, dtype)


def product(
    left: torch.Tensor, right: torch.Tensor, scaling: float = 1.0, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return scaling * left @ right in `dtype` (None: theirs), as one product where torch has it."""
    if dtype is torch.float32 and left.itemsize == 2 and left.is_cuda:
        wide = torch.mm(left, right, out_dtype=torch.float32)
        return wide if scaling == 1 else wide.mul_(scaling)
    # With beta = 0 the values of what the product is added to do not count.
    result = left @ right if scaling == 1 else torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)
    return result if dtype is None else cast(result, dtype)


def _gradient_dtype(h: torch.Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32) if h.is_cuda else h.dtype


def _narrow(x: torch.Tensor, a: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """Return x @ a^T for a few rows of a. In fp32 MKL takes twice as long or more where they don't fill vectors of 16."""
    if x.device.type == "cpu" and x.dtype is torch.float32 and a.shape[0] % 16:
        return product(a, x.t(), scaling).t()
    return product(x, a.t(), scaling)


def _rows(x: torch.Tensor) -> int:
    return max(1, _SLICE // max(1, x.shape[1]))
