"""One kernel that writes the effective weight: round(dequant(W) + scaling * B @ A), W in NF4 or FP4.

It reads the packed weight once and writes the result once. What bounds it besides memory is the number of instructions
for each value, so words of eight values are decoded where they lie in a thread, and a program works down several tiles
of the same columns: it keeps its part of A, and asks for the next tile before it decodes this one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import RequestError
from ...weights import primitives
from ..autocast import cast
from .launching import TRITON_DTYPES, block_of, ceil_div, facts, register, start, unit_stride, written

NESTED_BITS = tl.constexpr(primitives.NESTED_BLOCKSIZE.bit_length() - 1)


@triton.jit
def _statistics(absmax_ptr, absmax2_ptr, block, inside, NESTED: tl.constexpr):
    """What the maxima of these blocks are made of: an index and a scale if nested."""
    first = tl.load(absmax_ptr + block, mask=inside, other=0)
    second = first
    if NESTED:
        second = tl.load(absmax2_ptr + (block >> NESTED_BITS), mask=inside, other=0.0)
    return first, second


@triton.jit
def _maxima(first, second, code2_ptr, offset, NESTED: tl.constexpr):
    if NESTED:
        return tl.load(code2_ptr + first.to(tl.int32)) * second + offset
    else:
        return first


@triton.jit
def _factor(values, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """A factor as it is multiplied. The products of tf32 would cut fp32 values; here they are rounded."""
    values = values.to(DTYPE)
    if PRECISION == "tf32":
        rounded = ((values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        values = tl.where(values == values, rounded, values)
    return values


@triton.jit
def _looked_up(word, table):
    """Words (rows, words) of eight values in 4 bits -> their values (rows, words, 8) of the code's sixteen."""
    order = tl.arange(0, 8)
    shifted = word[:, :, None] >> ((order // 2) * 8 + 4 - (order % 2) * 4)[None, None, :]
    flat = tl.reshape(shifted & 15, (shifted.shape[0] * shifted.shape[1] * 8,))
    return tl.reshape(tl.gather(table, flat, 0), shifted.shape)


@triton.jit(do_not_specialize=["steps"])
def _words_kernel(
    packed_ptr,  # uint8, two values a byte, the first one in the high half
    absmax_ptr,  # fp32, or uint8 if NESTED
    code_ptr,  # fp32 (16,)
    absmax2_ptr,  # fp32
    code2_ptr,  # fp32 (256,)
    offset_ptr,  # fp32 (1,)
    a_ptr,  # (rank, inn)
    b_ptr,  # (out, rank)
    weight_ptr,  # (out, inn) contiguous
    out,
    inn,  # a multiple of 8: a word lies in one row, and in one block
    row_words,  # inn // 8, given apart so that its divisibility is known
    rank,
    a_stride,
    b_stride,
    scaling,
    steps,  # tiles of one program, one below the other
    BLOCK_BITS: tl.constexpr,
    NESTED: tl.constexpr,
    MERGE: tl.constexpr,
    ONCE: tl.constexpr,  # all ranks at a time
    LONG: tl.constexpr,  # 2^31 values or more
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
    AHEAD: tl.constexpr,  # ask for the next tile before this one is decoded
):
    across = tl.cdiv(inn, COLS)
    row0 = (tl.program_id(0) // across) * (ROWS * steps)
    col0 = (tl.program_id(0) % across) * COLS
    cols = col0 + tl.arange(0, COLS)
    col_inside = cols < inn
    words = tl.arange(0, COLS // 8)
    word_inside = (col0 + words * 8 < inn)[None, :]
    rows = row0 + tl.arange(0, ROWS)
    end = tl.minimum(row0 + ROWS * steps, out)
    ranks = tl.arange(0, RANKS)
    if LONG:
        corner = row0.to(tl.int64) * inn + col0
    else:
        corner = row0 * inn + col0
    # From the corner of a tile: the same for all tiles.
    local_rows = tl.arange(0, ROWS)[:, None]
    word_place = local_rows * row_words + words[None, :]
    place = local_rows * inn + tl.arange(0, COLS)[None, :]
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True)

    a, b = tl.zeros((RANKS, COLS), DTYPE), tl.zeros((ROWS, RANKS), DTYPE)
    if MERGE and ONCE:
        a_inside = (ranks < rank)[:, None] & col_inside[None, :]
        a = tl.load(a_ptr + ranks.to(tl.int64)[:, None] * a_stride + cols[None, :], mask=a_inside, other=0.0)
        a = _factor(a, DTYPE, PRECISION)

    offset = tl.load(offset_ptr)
    inside = (rows < out)[:, None] & word_inside
    word = tl.load(words_ptr + (corner >> 3) + word_place, mask=inside, other=0)
    block = (corner + word_place * 8) >> BLOCK_BITS
    first, second = _statistics(absmax_ptr, absmax2_ptr, block, inside, NESTED)
    table = tl.load(code_ptr + tl.arange(0, 16))
    for _ in tl.range(0, steps, num_stages=1):  # type: ignore[misc]
        row_inside = (rows < out)[:, None]
        if MERGE and ONCE:
            b_inside = row_inside & (ranks < rank)[None, :]
            b_rows = b_ptr + rows.to(tl.int64)[:, None] * b_stride
            b = _factor(tl.load(b_rows + ranks[None, :], mask=b_inside, other=0.0), DTYPE, PRECISION)
        maxima = _maxima(first, second, code2_ptr, offset, NESTED)
        this, here = word, corner
        rows += ROWS
        corner += ROWS * inn
        if AHEAD:
            inside = (rows < end)[:, None] & word_inside
            word = tl.load(words_ptr + (corner >> 3) + word_place, mask=inside, other=0)
            block = (corner + word_place * 8) >> BLOCK_BITS
            first, second = _statistics(absmax_ptr, absmax2_ptr, block, inside, NESTED)
        base = _looked_up(this, table) * maxima[:, :, None]
        base = tl.reshape(base, (ROWS, COLS))
        if MERGE:
            change = tl.zeros((ROWS, COLS), tl.float32)
            if ONCE:
                change = tl.dot(b, a, change, input_precision=PRECISION)
            else:
                for start in range(0, rank, RANKS):
                    more = start + ranks
                    b_inside = row_inside & (more < rank)[None, :]
                    a_inside = (more < rank)[:, None] & col_inside[None, :]
                    b_rows = b_ptr + (rows - ROWS).to(tl.int64)[:, None] * b_stride
                    b = tl.load(b_rows + more[None, :], mask=b_inside, other=0.0)
                    a_rows = a_ptr + more.to(tl.int64)[:, None] * a_stride
                    a = _factor(tl.load(a_rows + cols[None, :], mask=a_inside, other=0.0), DTYPE, PRECISION)
                    change = tl.dot(_factor(b, DTYPE, PRECISION), a, change, input_precision=PRECISION)
            base = tl.fma(change, tl.zeros_like(change) + scaling, base)
        value = base.to(weight_ptr.dtype.element_ty)
        tl.store(weight_ptr + here + place, value, mask=row_inside & col_inside[None, :])
        if not AHEAD:
            inside = (rows < end)[:, None] & word_inside
            word = tl.load(words_ptr + (corner >> 3) + word_place, mask=inside, other=0)
            block = (corner + word_place * 8) >> BLOCK_BITS
            first, second = _statistics(absmax_ptr, absmax2_ptr, block, inside, NESTED)


@triton.jit
def _values_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    a_ptr,
    b_ptr,
    weight_ptr,
    out,
    inn,
    rank,
    a_stride,
    b_stride,
    scaling,
    BLOCK_BITS: tl.constexpr,
    NESTED: tl.constexpr,
    MERGE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """The same for rows that are no multiple of 8 long, or bytes that start between words: value by value."""
    across = tl.cdiv(inn, COLS)
    rows = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % across) * COLS + tl.arange(0, COLS)
    wide_rows = rows.to(tl.int64)
    index = wide_rows[:, None] * inn + cols[None, :]
    inside = (rows < out)[:, None] & (cols < inn)[None, :]
    pair = tl.load(packed_ptr + (index >> 1), mask=inside, other=0)
    first, second = _statistics(absmax_ptr, absmax2_ptr, index >> BLOCK_BITS, inside, NESTED)
    value = tl.where(index % 2 == 0, pair >> 4, pair & 15)
    offset = tl.load(offset_ptr)
    base = tl.load(code_ptr + value.to(tl.int32)) * _maxima(first, second, code2_ptr, offset, NESTED)
    if MERGE:
        change = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, rank, RANKS):
            ranks = start + tl.arange(0, RANKS)
            b_inside = (rows < out)[:, None] & (ranks < rank)[None, :]
            a_inside = (ranks < rank)[:, None] & (cols < inn)[None, :]
            b = tl.load(b_ptr + wide_rows[:, None] * b_stride + ranks[None, :], mask=b_inside, other=0.0)
            a = tl.load(a_ptr + ranks.to(tl.int64)[:, None] * a_stride + cols[None, :], mask=a_inside, other=0.0)
            a = _factor(a, DTYPE, PRECISION)
            change = tl.dot(_factor(b, DTYPE, PRECISION), a, change, input_precision=PRECISION)
        base = tl.fma(change, tl.zeros_like(change) + scaling, base)
    tl.store(weight_ptr + index, base.to(weight_ptr.dtype.element_ty), mask=inside)


class Tile(NamedTuple):
    """What one program of the kernel works on: rows x cols of the weight at a time, `ranks` of B @ A at a time.

    Attributes:
        programs: how many programs there should be for each processor; each takes several tiles, one below the other.
        ahead: ask for the next tile before this one is decoded.
    """

    rows: int
    cols: int
    ranks: int
    warps: int
    stages: int
    programs: int
    ahead: bool


def choose_tile(rank: int, wide: bool, capability: tuple[int, int]) -> Tile:
    """Return the tile for a rank (0: dequantize only). A table and no search: nothing is timed at run time."""
    if capability < (8, 0):
        # 64 KiB of shared memory are too little for the large tiles.
        return Tile(32, 128, block_of(rank, 16, 32), 4, 2, 4, True)
    if rank == 0:
        return Tile(32, 128, 16, 8, 2, 3, True)
    if rank <= 16:
        return Tile(16, 128, 16, 4, 2, 6, True)
    # The larger the tile, the less often A and B are read again.
    rows = 64 if rank <= 64 else 128
    return Tile(rows, 128, block_of(rank, 16, 32 if wide else 64), 8, 2, 1 << 20, False)


class Plan(NamedTuple):
    """What a launch needs and does not depend on values or addresses."""

    kernel: Any
    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    after: tuple[int, ...]
    settings: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _plan(
    device: torch.device,
    out: int,
    inn: int,
    rank: int,
    blocksize: int,
    nested: bool,
    words: bool,
    factor: torch.dtype | None,
    dtype: torch.dtype,
    tile: Tile | None,
) -> Plan:
    """Return how to launch: `words` if packed values can be read as words, `factor` is what factors are multiplied as."""
    known = facts(device)
    wide = factor is not None and not known.multiplies(factor)
    tile = tile or choose_tile(rank, wide, known.capability)
    precision = "ieee"
    if wide and known.capability >= (8, 0):
        # Rounding to bf16 loses eight times as much of the sum as tf32 loses of the update.
        precision = "tf32" if dtype == torch.bfloat16 else "tf32x3"
    settings: dict[str, Any] = dict(
        BLOCK_BITS=blocksize.bit_length() - 1,
        NESTED=nested,
        MERGE=rank > 0,
        DTYPE=tl.float32 if wide or factor is None else TRITON_DTYPES[factor],
        PRECISION=precision,
        ROWS=tile.rows,
        COLS=tile.cols,
        RANKS=tile.ranks,
        num_warps=tile.warps,
        num_stages=tile.stages,
        # bitsandbytes rounds the product before it adds the offset.
        enable_fp_fusion=False,
    )
    down, across = ceil_div(out, tile.rows), ceil_div(inn, tile.cols)
    if not words:
        return Plan(_values_kernel, (down * across,), (out, inn, rank), (), settings)
    steps = max(1, down * across // (tile.programs * known.processors))
    settings |= dict(
        ONCE=rank <= tile.ranks,
        LONG=(ceil_div(down, steps) + 1) * steps * tile.rows * inn >= 1 << 31,
        AHEAD=tile.ahead,
    )
    grid = (ceil_div(down, steps) * across,)
    return Plan(_words_kernel, grid, (out, inn, inn // 8, rank), (steps,), settings)


def launch(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    absmax2: torch.Tensor | None,
    code2: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    out: int,
    inn: int,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Run the kernel. `tile` is for measuring; see `dequantize_merge` for the rest."""
    device = packed.device
    weight = torch.empty((out, inn), dtype=written(dtype, device), device=device)
    if out == 0 or inn == 0:
        return cast(weight, dtype)
    packed = packed if packed.is_contiguous() else packed.contiguous()
    packed = packed if packed.dtype is torch.uint8 else packed.view(torch.uint8)
    second = (absmax, code, code)
    if absmax2 is not None and code2 is not None and offset is not None:
        if offset.dtype is not torch.float32 or offset.device != device:
            offset = offset.to(device=device, dtype=torch.float32)
        second = (absmax2, code2, offset)
    rank, factor, strides = 0, None, (0, 0)
    if a is not None and b is not None:
        a, b = unit_stride(a), unit_stride(b)
        factor = a.dtype if a.dtype is b.dtype else torch.float32
        rank, strides = a.shape[0], (a.stride(0), b.stride(0))
    words = inn % 8 == 0 and packed.data_ptr() % 4 == 0
    plan = _plan(device, out, inn, rank, blocksize, absmax2 is not None, words, factor, dtype, tile)
    operands = (absmax, code, *second, code if a is None else a, code if b is None else b, weight)
    start(plan.kernel, plan.grid, packed, *operands, *plan.sizes, *strides, scaling, *plan.after, **plan.settings)
    return cast(weight, dtype)


def _fake(packed, absmax, code, absmax2, code2, offset, blocksize, out, inn, a, b, scaling, dtype):
    return packed.new_empty((out, inn), dtype=dtype)


_operator = register(
    "triton_dequantize_merge(Tensor packed, Tensor absmax, Tensor code, Tensor? absmax2, Tensor? code2, "
    "Tensor? offset, int blocksize, SymInt out, SymInt inn, Tensor? a, Tensor? b, float scaling, ScalarType dtype) "
    "-> Tensor",
    launch,
    _fake,
)


def dequantize_merge(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the effective weight round(dequant(W) + scaling * b @ a), rounded once, from fp32.

    Without a and b it equals `bitsandbytes.functional.dequantize_4bit` exactly (FP4's second zero is +0). No derivative.

    Args:
        packed: uint8, or any dtype those bytes are viewed as; (out * inn + 1) // 2 bytes, row-major, high half first.
        absmax: one value for each block: fp32, or uint8 if nested.
        code: (16,) fp32, the format's values, as in `QuantState.code`.
        nested: (absmax2 fp32, code2 (256,) fp32, offset fp32, one value) of nested statistics, else None.
        blocksize: values that share one maximum, a power of two from 32 to 4096.
        quant_type: "nf4" or "fp4"; the kernel knows the packing of no other format.
        shape: (out, inn); a convolution's is (out, in / groups * kernel size).
        a: (rank, inn) fp32, bf16 or fp16, or None with b.
        b: (out, rank) fp32, bf16 or fp16. Two factors of one 16-bit dtype are multiplied as they are, others in fp32:
            from compute capability 8.0 on as three tf32 products, or as one where the result is bf16. Accumulated in
            fp32 always.
        scaling: factor of b @ a.
        dtype: fp32, bf16 or fp16.

    Returns:
        (out, inn) of `dtype`, contiguous.

    Raises:
        RequestError: another format, block size or dtype, or tensors whose sizes don't fit together.
    """
    primitives.check_settings(quant_type, blocksize)
    out, inn = shape
    for kind in (dtype, *(factor.dtype for factor in (a, b) if factor is not None)):
        if kind not in primitives.FLOATS:
            raise RequestError(f"The effective weight and its factors can be fp32, bf16 or fp16, not {kind}.")
    if packed.numel() * packed.element_size() < (out * inn + 1) // 2:
        raise RequestError(
            f"{packed.numel() * packed.element_size()} packed bytes are too few for {out} x {inn} values."
        )
    if absmax.numel() < primitives.blocks(out * inn, blocksize):
        raise RequestError(f"{absmax.numel()} block maxima are too few for {out} x {inn} values, {blocksize} a block.")
    if (a is None) != (b is None):
        raise RequestError("Give both LoRA factors, a and b, or neither.")
    if a is not None and b is not None and (a.shape[1] != inn or b.shape != (out, a.shape[0])):
        raise RequestError(f"LoRA factors {tuple(a.shape)} and {tuple(b.shape)} don't fit a weight of {out} x {inn}.")
    absmax2, code2, offset = nested or (None, None, None)
    # The operator is for who looks at operations (compilers, simulated tensors); it takes as long as the launch itself.
    run = _operator if torch.compiler.is_compiling() or type(packed) is FakeTensor else launch
    return run(packed, absmax, code, absmax2, code2, offset, blocksize, out, inn, a, b, scaling, dtype)
