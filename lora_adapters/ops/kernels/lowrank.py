"""The skinny products of LoRA's forward and backward: one side is long (tokens x features), the other is the rank.

They are bound by memory, so each kernel reads or writes the long side once and accumulates in fp32:

    down       h  = x @ a^T                                   x (T, inn), a (R, inn)
    up         y  = scaling * h @ b^T + bias                  h (T, R), b (out, R), written in its dtype at once
    add_up     y += scaling * h @ b^T                         in place, rounded once
    up_grads   dh = scaling * dy @ b, db = scaling * dy^T @ h  dy (T, out) read once for both
    down_grad  da = dh^T @ x                                  dh (T, R), x (T, inn)

They are for operands of different dtypes, of which torch would make wide copies; for one dtype torch.mm is as fast, and
quicker to launch (`ops.lowrank` has the rule). bf16 times fp32 is three products of bf16: the fp32 operand is the sum of
three bf16 values (`_thirds`), and the long one is multiplied as it is. Other mixes are multiplied in fp32.

A product over many rows or columns is cut into parts. Each program writes its own fp32 part and a second small kernel
adds them in a fixed order: no atomics, the same bits every time. Above R = 32, up_grads is the kernels of `down` and
`down_grad`, and every 64 ranks read the long operand again. Nothing is timed at run time.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...errors import RequestError
from ...weights.primitives import FLOATS
from ..autocast import cast
from .launching import TRITON_DTYPES, DeviceFacts, block_of, ceil_div, facts, register, start, unit_stride, written
from .partial_sums import sum_parts

#: Up to this rank `up_grads` is one kernel.
FUSED_RANK = 32
#: The most ranks that one program of a kernel works on.
_MOST_RANKS = 64
#: Values of dy from which one reading of it for both gradients beats two products of torch, launches included.
_FUSED_VALUES = 1 << 25


class Tile(NamedTuple):
    """What one program works on at a time, and into how many parts the sum is cut."""

    tokens: int
    features: int
    ranks: int
    parts: int
    warps: int
    stages: int


class Arithmetic(NamedTuple):
    """How two operands are multiplied.

    Attributes:
        thirds: the fp32 operand is taken as three bf16 values.
        dtype: what operands are converted to, as triton names it.
        precision: of fp32 products.
        long_bytes: what a value of the long operand takes in shared memory.
    """

    thirds: bool
    dtype: Any
    precision: str
    long_bytes: int


def arithmetic(device: torch.device, long: torch.dtype, *short: torch.dtype) -> Arithmetic:
    """Return how a long operand is multiplied with short ones."""
    known = facts(device)
    if known.multiplies(long, *short):
        return Arithmetic(False, TRITON_DTYPES[long], "ieee", 2)
    if long == torch.bfloat16 and all(dtype == torch.float32 for dtype in short):
        if long in known.tensor_dtypes:
            return Arithmetic(True, tl.bfloat16, "ieee", 2)
        if device.type == "cpu":  # the interpreter multiplies no bf16: the same three values, as fp32
            return Arithmetic(True, tl.float32, "ieee", 2)
    return Arithmetic(False, tl.float32, known.precision, 4)


@triton.jit
def _cut(values):
    """The upper half of fp32 values' bits as bf16, and what is left. Rounding would be better but is a slow instruction."""
    bits = values.to(tl.uint32, bitcast=True)
    rest = values - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), rest


@triton.jit
def _thirds(values):
    """Three bf16 values whose sum is an fp32 one."""
    first, rest = _cut(values)
    rest = tl.where(rest == rest, rest, 0.0)  # infinity - infinity
    second, rest = _cut(rest)
    third, _ = _cut(rest)
    return first, second, third


@triton.jit
def _long_times_short(long, short, total, minor, THIRDS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    if THIRDS:
        first, second, third = _thirds(short)
        minor = tl.dot(long.to(DTYPE), third.to(DTYPE), minor)
        minor = tl.dot(long.to(DTYPE), second.to(DTYPE), minor)
        total = tl.dot(long.to(DTYPE), first.to(DTYPE), total)
    else:
        total = tl.dot(long.to(DTYPE), short.to(DTYPE), total, input_precision=PRECISION)
    return total, minor


@triton.jit
def _short_times_long(short, long, total, minor, THIRDS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    if THIRDS:
        first, second, third = _thirds(short)
        minor = tl.dot(third.to(DTYPE), long.to(DTYPE), minor)
        minor = tl.dot(second.to(DTYPE), long.to(DTYPE), minor)
        total = tl.dot(first.to(DTYPE), long.to(DTYPE), total)
    else:
        total = tl.dot(short.to(DTYPE), long.to(DTYPE), total, input_precision=PRECISION)
    return total, minor


@triton.jit
def _sum(total, minor, THIRDS: tl.constexpr):
    # Infinity times the zeros that follow a round first value: the total has the right infinity already.
    if THIRDS:
        total += tl.where(tl.abs(minor) < float("inf"), minor, 0.0)
    return total


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
    THIRDS: tl.constexpr,
    DTYPE: tl.constexpr,
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
    minor = tl.zeros((TOKENS, RANKS), tl.float32)
    for first in range(begin, tl.minimum(begin + part, features), FEATURES):
        cols = first + tl.arange(0, FEATURES)
        inside = cols < features
        x = tl.load(x_rows + cols[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        a_cols = cols.to(tl.int64)[:, None] * a_step
        a = tl.load(a_rows + a_cols, mask=inside[:, None] & rank_inside[None, :], other=0.0)
        h, minor = _long_times_short(x, a, h, minor, THIRDS, DTYPE, PRECISION)
    place = (tl.program_id(2).to(tl.int64) * tokens + rows)[:, None] * rank + ranks[None, :]
    h = (_sum(h, minor, THIRDS) * scaling).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + place, h, mask=row_inside[:, None] & rank_inside[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _up_kernel(
    h_ptr,  # (tokens, rank)
    b_ptr,  # (features, rank)
    bias_ptr,  # (features,)
    y_ptr,  # (tokens, features) contiguous
    tokens,
    features,
    rank,
    h_stride,
    b_stride,
    b_step,  # from one rank to the next
    scaling,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,  # to what is in y
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANKS: tl.constexpr,
):
    across = tl.cdiv(features, FEATURES)
    rows = (tl.program_id(0) // across).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    cols = (tl.program_id(0) % across) * FEATURES + tl.arange(0, FEATURES)
    row_inside, inside = rows < tokens, cols < features
    y = tl.zeros((TOKENS, FEATURES), tl.float32)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        rank_inside = ranks < rank
        h_rows = h_ptr + rows[:, None] * h_stride
        h = tl.load(h_rows + ranks[None, :], mask=row_inside[:, None] & rank_inside[None, :], other=0.0)
        b_ranks = b_ptr + ranks.to(tl.int64)[:, None] * b_step
        b_cols = cols.to(tl.int64)[None, :] * b_stride
        b = tl.load(b_ranks + b_cols, mask=rank_inside[:, None] & inside[None, :], other=0.0)
        y = tl.dot(h.to(DTYPE), b.to(DTYPE), y, input_precision=PRECISION)
    y *= scaling
    if BIAS:
        y += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = y_ptr + rows[:, None] * features + cols[None, :]
    if ADD:
        y += tl.load(place, mask=row_inside[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(place, y.to(y_ptr.dtype.element_ty), mask=row_inside[:, None] & inside[None, :])


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
    THIRDS: tl.constexpr,
    DTYPE: tl.constexpr,
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
    db = tl.zeros((RANKS, FEATURES), tl.float32)
    db_minor = tl.zeros((RANKS, FEATURES), tl.float32)
    for first in range(begin, tl.minimum(begin + part, tokens), TOKENS):
        rows = (first + tl.arange(0, TOKENS)).to(tl.int64)
        row_inside = rows < tokens
        dy_rows, h_rows = dy_ptr + rows[:, None] * dy_stride, h_ptr + rows[:, None] * h_stride
        dy = tl.load(dy_rows + cols[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        h = tl.load(h_rows + ranks[None, :], mask=row_inside[:, None] & rank_inside[None, :], other=0.0)
        dh = tl.zeros((TOKENS, RANKS), tl.float32)
        dh, dh_minor = _long_times_short(dy, b, dh, dh, THIRDS, DTYPE, PRECISION)
        dh = _sum(dh, dh_minor, THIRDS) * scaling
        place = (tl.program_id(0).to(tl.int64) * tokens + rows)[:, None] * rank + ranks[None, :]
        tl.store(dh_ptr + place, dh, mask=row_inside[:, None] & rank_inside[None, :])
        db, db_minor = _short_times_long(tl.trans(h), dy, db, db_minor, THIRDS, DTYPE, PRECISION)
    db = _sum(db, db_minor, THIRDS) * scaling
    place = (tl.program_id(1).to(tl.int64) * features + cols)[None, :] * rank + ranks[:, None]
    tl.store(db_ptr + place, db, mask=rank_inside[:, None] & inside[None, :])


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
    THIRDS: tl.constexpr,
    DTYPE: tl.constexpr,
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
    minor = tl.zeros((RANKS, FEATURES), tl.float32)
    for first in range(begin, tl.minimum(begin + part, tokens), TOKENS):
        rows = (first + tl.arange(0, TOKENS)).to(tl.int64)
        row_inside = rows < tokens
        dh_rows, x_rows = dh_ptr + rows[:, None] * dh_stride, x_ptr + rows[:, None] * x_stride
        dh = tl.load(dh_rows + ranks[None, :], mask=row_inside[:, None] & rank_inside[None, :], other=0.0)
        x = tl.load(x_rows + cols[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        da, minor = _short_times_long(tl.trans(dh), x, da, minor, THIRDS, DTYPE, PRECISION)
    da = _sum(da, minor, THIRDS) * scaling
    place = (tl.program_id(2).to(tl.int64) * rank + ranks)[:, None] * features + cols[None, :]
    tl.store(da_ptr + place, da, mask=rank_inside[:, None] & inside[None, :])


def down_tile(tokens: int, features: int, rank: int, how: Arithmetic, known: DeviceFacts) -> Tile:
    """Return the tile of `down`: few tokens, so that all processors have work, and long pieces of their rows."""
    ranks = block_of(rank, 16, _MOST_RANKS)
    # a is read, and cut in thirds, again for each tile of rows.
    rows = 64 if tokens > 16 * known.processors else 16
    cols = block_of(features, 16, 128 if ranks <= FUSED_RANK and how.long_bytes == 2 else 32)
    programs = ceil_div(tokens, rows) * ceil_div(rank, ranks)
    # Only long rows are cut: adding the parts is a launch of its own.
    parts = max(1, min(2 * known.processors // programs, features // 1024))
    return Tile(rows, cols, ranks, parts, 4, known.stages(rows * cols * how.long_bytes + ranks * cols * 4))


def up_tile(tokens: int, features: int, rank: int, how: Arithmetic, known: DeviceFacts) -> Tile:
    """Return the tile of `up`. Nothing is summed over parts: the rank is short."""
    return Tile(32, block_of(features, 16, 128), block_of(rank, 16, FUSED_RANK), 1, 4, 1)


def up_grads_tile(tokens: int, features: int, rank: int, how: Arithmetic, known: DeviceFacts) -> Tile:
    """Return the tile of `up_grads`: many columns, because there is a part of dh for each tile of columns."""
    ranks = block_of(rank, 16, FUSED_RANK)
    rows, most = (64, 256) if how.long_bytes == 2 else (32, 128)
    cols = block_of(features, 16, most // 2 if how.thirds else most)
    parts = _parts(tokens, rows, ceil_div(features, cols), 3 * known.processors // 2)
    return Tile(rows, cols, ranks, parts, 4, known.stages(rows * cols * how.long_bytes + rows * ranks * 4))


def grad_tile(tokens: int, features: int, rank: int, how: Arithmetic, known: DeviceFacts) -> Tile:
    """Return the tile of `down_grad`."""
    ranks = block_of(rank, 16, _MOST_RANKS)
    rows, most = (64, 128) if how.long_bytes == 2 else (32, 64)
    cols = block_of(features, 16, most)
    parts = _parts(tokens, rows, ceil_div(features, cols) * ceil_div(rank, ranks), 2 * known.processors)
    return Tile(rows, cols, ranks, parts, 4, known.stages(rows * cols * how.long_bytes + rows * ranks * 4))


def _parts(tokens: int, step: int, programs: int, wanted: int) -> int:
    """Return into how many parts to cut the tokens: so many programs are wanted, but each with at least four steps."""
    return max(1, min(ceil_div(wanted, programs), ceil_div(tokens, 4 * step)))


def _part_size(count: int, parts: int, step: int) -> int:
    """Return the size of a part, a multiple of the step."""
    return max(1, ceil_div(ceil_div(count, parts), step) * step)


class Plan(NamedTuple):
    """What a launch needs and does not depend on values or addresses."""

    tile: Tile
    settings: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _plan(
    choose: Any, tokens: int, features: int, rank: int, device: torch.device, dtypes: tuple[torch.dtype, ...], tile: Any
) -> Plan:
    """Return the tile, the chosen one if it is None, and what the kernel takes by name."""
    how = arithmetic(device, *dtypes)
    if how.thirds and choose is up_tile:  # whose kernel cuts nothing in thirds: both operands are short
        how = Arithmetic(False, tl.float32, facts(device).precision, 4)
    tile = tile or choose(tokens, features, rank, how, facts(device))
    settings = dict(
        DTYPE=how.dtype,
        PRECISION=how.precision,
        TOKENS=tile.tokens,
        FEATURES=tile.features,
        RANKS=tile.ranks,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,  # said because Triton changes its default
    )
    return Plan(tile, settings if choose is up_tile else settings | {"THIRDS": how.thirds})


def launch_down(
    x: torch.Tensor, a: torch.Tensor, scaling: float, dtype: torch.dtype, tile: Tile | None = None
) -> torch.Tensor:
    """Return scaling * x @ a^T (tokens, rank) in `dtype`. a may have any strides. `tile` is for measuring."""
    (tokens, features), rank, device = x.shape, a.shape[0], x.device
    if tokens == 0:
        return x.new_empty((0, rank), dtype=dtype)
    x = unit_stride(x)
    tile, settings = _plan(down_tile, tokens, features, rank, device, (x.dtype, a.dtype), tile)
    part = _part_size(features, tile.parts, tile.features)
    parts = max(1, ceil_div(features, part))
    h = x.new_empty((parts, tokens, rank), dtype=torch.float32 if parts > 1 else written(dtype, device))
    grid = (ceil_div(tokens, tile.tokens), ceil_div(rank, tile.ranks), parts)
    strides = (x.stride(0), *a.stride())
    start(_down_kernel, grid, x, a, h, tokens, features, rank, *strides, scaling, part, **settings)
    return sum_parts(h, dtype)


def launch_up(
    h: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Return scaling * h @ b^T + bias (tokens, features) in `dtype`. b may have any strides. `tile` is for measuring."""
    y = h.new_empty((h.shape[0], b.shape[0]), dtype=written(dtype, h.device))
    _start_up(y, h, b, bias, scaling, False, tile)
    return cast(y, dtype)


def launch_add_up(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    """Add scaling * h @ b^T to y (tokens, features), contiguous, in place. b may have any strides."""
    dtype = written(y.dtype, y.device)
    into = y if dtype is y.dtype else y.to(dtype)
    _start_up(into, h, b, None, scaling, True, None)
    if into is not y:
        y.copy_(into)


def _start_up(
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    add: bool,
    tile: Tile | None,
) -> None:
    tokens, (features, rank) = h.shape[0], b.shape
    if y.numel() == 0:
        return
    h, bias = unit_stride(h), None if bias is None else bias.contiguous()
    tile, settings = _plan(up_tile, tokens, features, rank, h.device, (h.dtype, b.dtype), tile)
    grid = (ceil_div(tokens, tile.tokens) * ceil_div(features, tile.features),)
    operands = (b, b if bias is None else bias, y, tokens, features, rank, h.stride(0), *b.stride(), scaling)
    start(_up_kernel, grid, h, *operands, BIAS=bias is not None, ADD=add, **settings)


def launch_up_grads(
    dy: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scaling: float, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scaling * dy @ b in h's dtype and scaling * dy^T @ h in fp32. `tile` is for measuring."""
    (tokens, features), rank, device = dy.shape, b.shape[1], dy.device
    if tokens == 0:
        return torch.empty_like(h), b.new_zeros(b.shape, dtype=torch.float32)
    if rank > FUSED_RANK:
        dh = launch_down(dy, b.t(), scaling, h.dtype)
        return dh, launch_down_grad(h, dy, scaling).t().contiguous()
    dy, h, b = unit_stride(dy), unit_stride(h), unit_stride(b)
    tile, settings = _plan(up_grads_tile, tokens, features, rank, device, (dy.dtype, h.dtype, b.dtype), tile)
    part = _part_size(tokens, tile.parts, tile.tokens)
    grid = (ceil_div(features, tile.features), ceil_div(tokens, part))
    dh = dy.new_empty((grid[0], tokens, rank), dtype=torch.float32)
    db = dy.new_empty((grid[1], features, rank), dtype=torch.float32)
    strides = (dy.stride(0), h.stride(0), b.stride(0))
    start(_up_grads_kernel, grid, dy, h, b, dh, db, tokens, features, rank, *strides, scaling, part, **settings)
    return sum_parts(dh, h.dtype), sum_parts(db, torch.float32)


def launch_down_grad(dh: torch.Tensor, x: torch.Tensor, scaling: float = 1.0, tile: Tile | None = None) -> torch.Tensor:
    """Return scaling * dh^T @ x (rank, features) in fp32. `tile` is for measuring."""
    (tokens, features), rank, device = x.shape, dh.shape[1], x.device
    if tokens == 0:
        return x.new_zeros((rank, features), dtype=torch.float32)
    dh, x = unit_stride(dh), unit_stride(x)
    tile, settings = _plan(grad_tile, tokens, features, rank, device, (x.dtype, dh.dtype), tile)
    part = _part_size(tokens, tile.parts, tile.tokens)
    grid = (ceil_div(features, tile.features), ceil_div(rank, tile.ranks), ceil_div(tokens, part))
    da = x.new_empty((grid[2], rank, features), dtype=torch.float32)
    strides = (dh.stride(0), x.stride(0))
    start(_down_grad_kernel, grid, dh, x, da, tokens, features, rank, *strides, scaling, part, **settings)
    return sum_parts(da, torch.float32)


def _fake_down(x, a, scaling, dtype):
    return x.new_empty((x.shape[0], a.shape[0]), dtype=dtype)


def _fake_up(h, b, bias, scaling, dtype):
    return h.new_empty((h.shape[0], b.shape[0]), dtype=dtype)


def _fake_add_up(y, h, b, scaling):
    return None


def _fake_up_grads(dy, h, b, scaling):
    return h.new_empty(h.shape), b.new_empty(b.shape, dtype=torch.float32)


def _fake_down_grad(dh, x, scaling):
    return x.new_empty((dh.shape[1], x.shape[1]), dtype=torch.float32)


_down = register(
    "triton_down(Tensor x, Tensor a, float scaling, ScalarType dtype) -> Tensor",
    launch_down,
    _fake_down,
)
_up = register(
    "triton_up(Tensor h, Tensor b, Tensor? bias, float scaling, ScalarType dtype) -> Tensor",
    launch_up,
    _fake_up,
)
_add_up = register(
    "triton_add_up(Tensor(a!) y, Tensor h, Tensor b, float scaling) -> ()",
    launch_add_up,
    _fake_add_up,
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

    Operands of one 16-bit dtype are multiplied as they are; others in fp32's accuracy, converted tile by tile.

    Args:
        x: (T, inn) fp32, bf16 or fp16. Rows may lie apart; if the values of a row do, a copy is made.
        a: (R, inn) fp32, bf16 or fp16, with any strides.
        dtype: of the result.

    Returns:
        (T, R) of `dtype`, contiguous.

    Raises:
        RequestError: the shapes don't fit together, or a dtype is another one.
    """
    _check(x.shape[1] == a.shape[1], x=x, a=a)
    return _down(x, a, 1.0, dtype)


def up(
    h: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, scaling: float = 1.0
) -> torch.Tensor:
    """Return scaling * h @ b^T + bias, accumulated in fp32 and rounded once. No derivative.

    Args:
        h: (T, R) fp32, bf16 or fp16.
        b: (out, R) fp32, bf16 or fp16, with any strides.
        bias: (out,) fp32, bf16 or fp16, or None. It is not scaled.
        dtype: of the result, fp32, bf16 or fp16.
        scaling: factor of the product.

    Returns:
        (T, out) of `dtype`, contiguous.

    Raises:
        RequestError: the shapes don't fit together, or a dtype is another one.
    """
    if bias is None:
        _check(h.shape[1] == b.shape[1], h=h, b=b)
    else:
        _check(h.shape[1] == b.shape[1] and bias.shape == b.shape[:1], h=h, b=b, bias=bias)
    if dtype not in FLOATS:
        raise RequestError(f"The kernels write fp32, bf16 and fp16, not {dtype}.")
    return _up(h, b, bias, scaling, dtype)


def add_up(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """Add scaling * h @ b^T to y in place: accumulated in fp32, rounded once. No derivative.

    Args:
        y: (T, out) fp32, bf16 or fp16, contiguous.
        h: (T, R) fp32, bf16 or fp16.
        b: (out, R) fp32, bf16 or fp16, with any strides.
        scaling: factor of the product.

    Returns:
        y.

    Raises:
        RequestError: the shapes don't fit together, y is not contiguous, or a dtype is another one.
    """
    _check(y.shape == (h.shape[0], b.shape[0]) and h.shape[1] == b.shape[1], y=y, h=h, b=b)
    if not y.is_contiguous():
        raise RequestError("add_up writes to a contiguous result only.")
    _add_up(y, h, b, scaling)
    return y


def up_grads_pays(dy: torch.Tensor, h: torch.Tensor) -> bool:
    """Return whether `up_grads` beats two products of torch for operands of one dtype."""
    large = h.shape[1] <= FUSED_RANK and dy.shape[0] * dy.shape[1] >= _FUSED_VALUES
    return large and dy.dtype in facts(dy.device).tensor_dtypes


def up_grads(dy: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of y = scaling * h @ b^T from one reading of dy (R <= 32). No derivative.

    Args:
        dy: (T, out) fp32, bf16 or fp16. Rows may lie apart; if the values of a row do, a copy is made.
        h: (T, R) fp32, bf16 or fp16.
        b: (out, R) fp32, bf16 or fp16.
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
