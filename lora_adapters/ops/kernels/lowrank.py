"""The skinny products of LoRA's forward and backward: one side is long (tokens x features), the other is the rank.

They are bound by memory, so each kernel reads the long operand once and accumulates in fp32:

    down       h  = x @ a^T                                   x (T, inn), a (R, inn)
    up_grads   dh = scaling * dy @ b, db = scaling * dy^T @ h  dy (T, out) read once for both, b (out, R), h (T, R)
    down_grad  da = dh^T @ x                                  dh (T, R), x (T, inn)

A product over many rows or columns is cut into parts. Each program writes its own fp32 part and a second small kernel
adds them in a fixed order: no atomics, the same bits every time. The parts are small beside the long operand while the
rank is (R / 128 of it for each result at the usual tile), and stay in the cache.

Which kernel runs:
    R <= 32: the kernels above.
    R > 32, operands of one dtype: torch.mm. cuBLAS is bound by the same memory and its tiles suit these ranks. Below
        compute capability 8.0, where only cuBLAS has tensor-core products, at every R.
    R > 32, operands of different dtypes: the kernels of `down` and `down_grad`, also for `up_grads`, which then reads
        dy twice, and 64 ranks at a time: each 64 ranks read the long operand again. No cast copy is ever made.
Tiles come from small tables (`down_tile`, `up_tile`, `grad_tile`); nothing is timed at run time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...errors import RequestError
from ...weights.primitives import FLOATS
from .launching import DeviceFacts, block_of, ceil_div, facts, register, start, unit_stride, written
from .partial_sums import sum_parts

#: Up to this rank the kernels run; above it torch.mm does, where the operands have one dtype.
FUSED_RANK = 32
#: The most ranks that one program of a kernel works on.
_MOST_RANKS = 64


class Tile(NamedTuple):
    """What one program works on at a time, and into how many parts the sum is cut."""

    tokens: int
    features: int
    ranks: int
    parts: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["tokens"])
def _down_kernel(
    x_ptr,  # (tokens, features)
    a_ptr,  # (rank, features)
    h_ptr,  # (parts, tokens, rank) contiguous
    tokens,
    features,
    rank,
    x_stride,
    a_stride,
    a_step,  # from one feature to the next
    scaling,
    part,  # features that one program sums over, a multiple of FEATURES
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANKS: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    begin = tl.program_id(2) * part
    row_inside, rank_inside = rows < tokens, ranks < rank
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    a_rows = a_ptr + ranks.to(tl.int64)[None, :] * a_stride
    h = tl.zeros((TOKENS, RANKS), tl.float32)
    for first in range(begin, tl.minimum(begin + part, features), FEATURES):
        cols = first + tl.arange(0, FEATURES)
        inside = cols < features
        x = tl.load(x_rows + cols[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        a_cols = cols.to(tl.int64)[:, None] * a_step
        a = tl.load(a_rows + a_cols, mask=inside[:, None] & rank_inside[None, :], other=0.0)
        if WIDE:
            x = x.to(tl.float32)
            a = a.to(tl.float32)
        h = tl.dot(x, a, h, input_precision=PRECISION)
    place = (tl.program_id(2).to(tl.int64) * tokens + rows)[:, None] * rank + ranks[None, :]
    h = (h * scaling).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + place, h, mask=row_inside[:, None] & rank_inside[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _up_grads_kernel(
    dy_ptr,  # (tokens, features)
    h_ptr,  # (tokens, rank)
    b_ptr,  # (features, rank)
    dh_ptr,  # fp32 (parts of the features, tokens, rank) contiguous
    db_ptr,  # fp32 (parts of the tokens, features, rank) contiguous
    tokens,
    features,
    rank,
    dy_stride,
    h_stride,
    b_stride,
    scaling,
    part,  # tokens that one program sums over, a multiple of TOKENS
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANKS: tl.constexpr,
):
    cols = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    ranks = tl.arange(0, RANKS)
    begin = tl.program_id(1) * part
    inside, rank_inside = cols < features, ranks < rank
    b_rows = b_ptr + cols.to(tl.int64)[:, None] * b_stride
    b = tl.load(b_rows + ranks[None, :], mask=inside[:, None] & rank_inside[None, :], other=0.0)
    if WIDE:
        b = b.to(tl.float32)
    db = tl.zeros((RANKS, FEATURES), tl.float32)
    for first in range(begin, tl.minimum(begin + part, tokens), TOKENS):
        rows = (first + tl.arange(0, TOKENS)).to(tl.int64)
        row_inside = rows < tokens
        dy_rows, h_rows = dy_ptr + rows[:, None] * dy_stride, h_ptr + rows[:, None] * h_stride
        dy = tl.load(dy_rows + cols[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        h = tl.load(h_rows + ranks[None, :], mask=row_inside[:, None] & rank_inside[None, :], other=0.0)
        if WIDE:
            dy = dy.to(tl.float32)
            h = h.to(tl.float32)
        dh = tl.dot(dy, b, input_precision=PRECISION) * scaling
        place = (tl.program_id(0).to(tl.int64) * tokens + rows)[:, None] * rank + ranks[None, :]
        tl.store(dh_ptr + place, dh, mask=row_inside[:, None] & rank_inside[None, :])
        db = tl.dot(tl.trans(h), dy, db, input_precision=PRECISION)
    place = (tl.program_id(1).to(tl.int64) * features + cols)[None, :] * rank + ranks[:, None]
    tl.store(db_ptr + place, db * scaling, mask=rank_inside[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _down_grad_kernel(
    dh_ptr,  # (tokens, rank)
    x_ptr,  # (tokens, features)
    da_ptr,  # fp32 (parts, rank, features) contiguous
    tokens,
    features,
    rank,
    dh_stride,
    x_stride,
    scaling,
    part,  # tokens that one program sums over, a multiple of TOKENS
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANKS: tl.constexpr,
):
    cols = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    begin = tl.program_id(2) * part
    inside, rank_inside = cols < features, ranks < rank
    da = tl.zeros((RANKS, FEATURES), tl.float32)
    for first in range(begin, tl.minimum(begin + part, tokens), TOKENS):
        rows = (first + tl.arange(0, TOKENS)).to(tl.int64)
        row_inside = rows < tokens
        dh_rows, x_rows = dh_ptr + rows[:, None] * dh_stride, x_ptr + rows[:, None] * x_stride
        dh = tl.load(dh_rows + ranks[None, :], mask=row_inside[:, None] & rank_inside[None, :], other=0.0)
        x = tl.load(x_rows + cols[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        if WIDE:
            dh = dh.to(tl.float32)
            x = x.to(tl.float32)
        da = tl.dot(tl.trans(dh), x, da, input_precision=PRECISION)
    place = (tl.program_id(2).to(tl.int64) * rank + ranks)[:, None] * features + cols[None, :]
    tl.store(da_ptr + place, da * scaling, mask=rank_inside[:, None] & inside[None, :])


def down_tile(tokens: int, features: int, rank: int, wide: bool, itemsize: int, known: DeviceFacts) -> Tile:
    """Return the tile of `down`: few tokens, so that all processors have work, and long pieces of their rows."""
    ranks = block_of(rank, 16, _MOST_RANKS)
    if ranks > FUSED_RANK:
        rows, cols = 64, 32
    else:
        # a is read again for each tile: 32 rows make that half of x's bytes at rank 16, which the cache can carry.
        rows = 32 if 4 * ceil_div(tokens, 32) >= 3 * known.processors else 16
        cols = 256 if ceil_div(tokens, rows) < 2 * known.processors else 128
        cols = cols // 2 if wide else cols
    cols = block_of(features, 16, cols)
    programs = ceil_div(tokens, rows) * ceil_div(rank, ranks)
    # Only long rows are cut: adding the parts is a launch of its own.
    parts = max(1, min(known.processors // programs, features // 2048))
    return Tile(rows, cols, ranks, parts, 4, known.stages((rows + ranks) * cols * itemsize))


def up_tile(tokens: int, features: int, rank: int, wide: bool, itemsize: int, known: DeviceFacts) -> Tile:
    """Return the tile of `up_grads`: many columns, because there is a part of dh for each tile of columns."""
    ranks = block_of(rank, 16, FUSED_RANK)
    cols = block_of(features, 16, 128 if wide else 256)
    parts = _parts(tokens, 32, ceil_div(features, cols), known)
    return Tile(32, cols, ranks, parts, 4, known.stages(32 * (cols + ranks) * itemsize))


def grad_tile(tokens: int, features: int, rank: int, wide: bool, itemsize: int, known: DeviceFacts) -> Tile:
    """Return the tile of `down_grad`."""
    ranks = block_of(rank, 16, _MOST_RANKS)
    cols = block_of(features, 16, 64 if wide else 128)
    rows = 32 if wide else 64
    parts = _parts(tokens, rows, ceil_div(features, cols) * ceil_div(rank, ranks), known)
    return Tile(rows, cols, ranks, parts, 4, known.stages(rows * (cols + ranks) * itemsize))


def _parts(tokens: int, step: int, programs: int, known: DeviceFacts) -> int:
    """Return into how many parts to cut the tokens: two programs for each processor, at least four steps in each."""
    return max(1, min(ceil_div(2 * known.processors, programs), ceil_div(tokens, 4 * step)))


def _part_size(count: int, parts: int, step: int) -> int:
    """Return the size of a part, a multiple of the step."""
    return ceil_div(ceil_div(count, parts), step) * step


def _fused(rank: int, known: DeviceFacts) -> bool:
    """Return whether kernels run whatever the dtypes are; see the rule at the top of this file."""
    return rank <= FUSED_RANK and bool(known.tensor_dtypes)


def _mm(left: torch.Tensor, right: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """Return scaling * left @ right for operands of one dtype, rounded once to `dtype`."""
    if scaling == 1 and left.dtype == dtype:
        return torch.mm(left, right)
    if left.dtype == torch.float32:
        product = torch.mm(left, right)
    elif left.is_cuda:
        product = torch.mm(left, right, out_dtype=torch.float32)
    else:
        product = torch.mm(left.float(), right.float())
    return product.mul_(scaling).to(dtype)


def _settings(tile: Tile, wide: bool, known: DeviceFacts) -> dict[str, Any]:
    """Return what every kernel here takes by name."""
    return dict(
        WIDE=wide,
        PRECISION=known.precision if wide else "ieee",
        TOKENS=tile.tokens,
        FEATURES=tile.features,
        RANKS=tile.ranks,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,  # said because Triton changes its default
    )


def launch_down(
    x: torch.Tensor, a: torch.Tensor, scaling: float, dtype: torch.dtype, tile: Tile | None = None
) -> torch.Tensor:
    """Return scaling * x @ a^T (tokens, rank) in `dtype`. a may have any strides. `tile` is for measuring."""
    (tokens, features), rank = x.shape, a.shape[0]
    if tokens == 0:
        return x.new_empty((0, rank), dtype=dtype)
    known = facts(x.device)
    if tile is None and x.dtype == a.dtype and not _fused(rank, known):
        return _mm(x, a.t(), scaling, dtype)
    x = unit_stride(x)
    wide = not known.multiplies(x.dtype, a.dtype)
    tile = tile or down_tile(tokens, features, rank, wide, max(x.itemsize, a.itemsize), known)
    part = max(1, _part_size(features, tile.parts, tile.features))
    parts = max(1, ceil_div(features, part))
    parts_dtype = torch.float32 if parts > 1 else written(dtype, x.device)
    h = x.new_empty((parts, tokens, rank), dtype=parts_dtype)
    start(
        _down_kernel,
        (ceil_div(tokens, tile.tokens), ceil_div(rank, tile.ranks), parts),
        x,
        a,
        h,
        tokens,
        features,
        rank,
        x.stride(0),
        a.stride(0),
        a.stride(1),
        scaling,
        part,
        **_settings(tile, wide, known),
    )
    return sum_parts(h, dtype)


def launch_up_grads(
    dy: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scaling: float, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scaling * dy @ b in h's dtype and scaling * dy^T @ h in fp32. `tile` is for measuring."""
    (tokens, features), rank = dy.shape, b.shape[1]
    if tokens == 0:
        return torch.empty_like(h), b.new_zeros(b.shape, dtype=torch.float32)
    known = facts(dy.device)
    if not _fused(rank, known):
        dh = launch_down(dy, b.t(), scaling, h.dtype)
        return dh, launch_down_grad(h, dy, scaling).t().contiguous()
    dy, h, b = unit_stride(dy), unit_stride(h), unit_stride(b)
    wide = not known.multiplies(dy.dtype, h.dtype, b.dtype)
    tile = tile or up_tile(tokens, features, rank, wide, max(dy.itemsize, h.itemsize), known)
    part = _part_size(tokens, tile.parts, tile.tokens)
    across, parts = ceil_div(features, tile.features), ceil_div(tokens, part)
    dh = dy.new_empty((across, tokens, rank), dtype=torch.float32)
    db = dy.new_empty((parts, features, rank), dtype=torch.float32)
    start(
        _up_grads_kernel,
        (across, parts),
        dy,
        h,
        b,
        dh,
        db,
        tokens,
        features,
        rank,
        dy.stride(0),
        h.stride(0),
        b.stride(0),
        scaling,
        part,
        **_settings(tile, wide, known),
    )
    return sum_parts(dh, h.dtype), sum_parts(db, torch.float32)


def launch_down_grad(dh: torch.Tensor, x: torch.Tensor, scaling: float = 1.0, tile: Tile | None = None) -> torch.Tensor:
    """Return scaling * dh^T @ x (rank, features) in fp32. `tile` is for measuring."""
    (tokens, features), rank = x.shape, dh.shape[1]
    if tokens == 0:
        return x.new_zeros((rank, features), dtype=torch.float32)
    known = facts(x.device)
    if tile is None and x.dtype == dh.dtype and not _fused(rank, known):
        return _mm(dh.t(), x, scaling, torch.float32)
    dh, x = unit_stride(dh), unit_stride(x)
    wide = not known.multiplies(dh.dtype, x.dtype)
    tile = tile or grad_tile(tokens, features, rank, wide, max(dh.itemsize, x.itemsize), known)
    part = _part_size(tokens, tile.parts, tile.tokens)
    parts = ceil_div(tokens, part)
    da = x.new_empty((parts, rank, features), dtype=torch.float32)
    start(
        _down_grad_kernel,
        (ceil_div(features, tile.features), ceil_div(rank, tile.ranks), parts),
        dh,
        x,
        da,
        tokens,
        features,
        rank,
        dh.stride(0),
        x.stride(0),
        scaling,
        part,
        **_settings(tile, wide, known),
    )
    return sum_parts(da, torch.float32)


def _fake_down(x, a, scaling, dtype):
    return x.new_empty((x.shape[0], a.shape[0]), dtype=dtype)


def _fake_up_grads(dy, h, b, scaling):
    return h.new_empty(h.shape), b.new_empty(b.shape, dtype=torch.float32)


def _fake_down_grad(dh, x, scaling):
    return x.new_empty((dh.shape[1], x.shape[1]), dtype=torch.float32)


_down = register(
    "triton_down(Tensor x, Tensor a, float scaling, ScalarType dtype) -> Tensor",
    launch_down,
    _fake_down,
)
_up_grads = register(
    "triton_up_grads(Tensor dy, Tensor h, Tensor b, float scaling) -> (Tensor, Tensor)",
    launch_up_grads,
    _fake_up_grads,
)
_down_grad = register(
    "triton_down_grad(Tensor dh, Tensor x, float scaling) -> Tensor",
    launch_down_grad,
    _fake_down_grad,
)


def _check(fit: bool, **operands: torch.Tensor) -> None:
    """Raise RequestError with the operands' shapes or dtypes: a kernel would read past an end, or in less precision."""
    if not fit:
        shapes = ", ".join(f"{name} {tuple(operand.shape)}" for name, operand in operands.items())
        raise RequestError(f"The operands of this product don't fit together: {shapes}.")
    if any(operand.dtype not in FLOATS for operand in operands.values()):
        dtypes = ", ".join(f"{name} {operand.dtype}" for name, operand in operands.items())
        raise RequestError(f"The kernels multiply fp32, bf16 and fp16, not {dtypes}: ask available(device, dtype).")


def down(x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x @ a^T, accumulated in fp32 and rounded once. No derivative.

    Operands of one 16-bit dtype are multiplied as they are; others in fp32 (as three tf32 products from compute
    capability 8.0 on), converted tile by tile.

    Args:
        x: (T, inn) fp32, bf16 or fp16. Rows may lie apart; if the values of a row do, a copy is made.
        a: (R, inn) fp32, bf16 or fp16.
        dtype: of the result.

    Returns:
        (T, R) of `dtype`, contiguous.

    Raises:
        RequestError: the shapes don't fit together, or a dtype is another one.
    """
    _check(x.shape[1] == a.shape[1], x=x, a=a)
    return _down(x, a, 1.0, dtype)


def up_grads(dy: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of y = scaling * h @ b^T from one reading of dy (R <= 32). No derivative.

    Args:
        dy: (T, out) fp32, bf16 or fp16. Rows may lie apart; if the values of a row do, a copy is made.
        h: (T, R) fp32, bf16 or fp16.
        b: (out, R) fp32, bf16 or fp16. If the three dtypes are not one 16-bit dtype, products are taken in fp32.
        scaling: factor of both results.

    Returns:
        dh = scaling * dy @ b, (T, R) in h's dtype, and db = scaling * dy^T @ h, (out, R) in fp32. Both contiguous.

    Raises:
        RequestError: the shapes don't fit together, or a dtype is another one.
    """
    _check(dy.shape == (h.shape[0], b.shape[0]) and h.shape[1] == b.shape[1], dy=dy, h=h, b=b)
    return _up_grads(dy, h, b, scaling)


def down_grad(dh: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a for h = x @ a^T: da = dh^T @ x. No derivative.

    Args:
        dh: (T, R) fp32, bf16 or fp16.
        x: (T, inn) fp32, bf16 or fp16. Rows may lie apart; if the values of a row do, a copy is made.

    Returns:
        (R, inn) in fp32, contiguous.

    Raises:
        RequestError: the shapes don't fit together, or a dtype is another one.
    """
    _check(dh.shape[0] == x.shape[0], dh=dh, x=x)
    return _down_grad(dh, x, 1.0)
