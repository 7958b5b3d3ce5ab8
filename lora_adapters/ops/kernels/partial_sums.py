"""The second step of a product that many programs share: the sum of their fp32 parts, always in the same order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..autocast import cast
from .launching import block_of, ceil_div, start, written


@triton.jit
def _sum_parts_kernel(
    parts_ptr,  # fp32 (count, size)
    sum_ptr,  # (size,)
    count,
    size,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for first in range(0, count, PARTS):
        # Many parts at a time, because each load waits for memory.
        parts = (first + tl.arange(0, PARTS)).to(tl.int64)
        inside = (parts < count)[:, None] & (place < size)[None, :]
        values = tl.load(parts_ptr + parts[:, None] * size + place[None, :], mask=inside, other=0.0)
        total += tl.sum(values, axis=0)
    tl.store(sum_ptr + place, total.to(sum_ptr.dtype.element_ty), mask=place < size)


def sum_parts(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the sum over the first dimension of fp32 parts (count, rows, cols), rounded once to `dtype`."""
    if parts.shape[0] == 1:
        return cast(parts.view(parts.shape[1:]), dtype)
    total = parts.new_empty(parts.shape[1:], dtype=written(dtype, parts.device))
    block = 256
    start(
        _sum_parts_kernel,
        (ceil_div(total.numel(), block),),
        parts,
        total,
        parts.shape[0],
        total.numel(),
        PARTS=block_of(parts.shape[0], 2, 32),
        SIZE=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return cast(total, dtype)
