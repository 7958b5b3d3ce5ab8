"""One kernel that writes the effective weight: round(dequant(W) + scaling * B @ A), W in NF4 or FP4.

It reads the packed weight once and writes the result once, so it costs what dequantizing alone costs: on an H100, in
bf16 at rank 16, 0.03 ms for 4096 x 4096. A tile is a few rows by 128 columns, because packed blocks run along rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...errors import RequestError
from ...weights import primitives
from .launching import block_of, ceil_div, facts, register, start, unit_stride, written

NESTED_BLOCKSIZE = tl.constexpr(primitives.NESTED_BLOCKSIZE)


@triton.jit
def _maxima(
    absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, block, inside, NESTED: tl.constexpr
):  # (any shape) int64 block numbers -> fp32 maxima
    if NESTED:
        index = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(absmax2_ptr + block // NESTED_BLOCKSIZE, mask=inside, other=0.0)
        return tl.load(code2_ptr + index) * scale + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=inside, other=0.0)


@triton.jit
def _dequantize_merge_kernel(
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
    inn,
    row_bytes,  # inn // 2, given apart so that its divisibility is known
    rank,
    a_stride,
    b_stride,
    scaling,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a maximum; 0: no such grouping
    MERGE: tl.constexpr,
    WIDE: tl.constexpr,  # multiply as fp32
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    across = tl.cdiv(inn, COLS)
    row0 = (tl.program_id(0) // across) * ROWS
    col0 = (tl.program_id(0) % across) * COLS
    rows = row0 + tl.arange(0, ROWS)
    cols = col0 + tl.arange(0, COLS)
    wide_rows = rows.to(tl.int64)
    index = wide_rows[:, None] * inn + cols[None, :]
    inside = (rows < out)[:, None] & (cols < inn)[None, :]

    # What the base is made of is asked for first and decoded last, so that it arrives while B @ A is computed.
    if GROUP > 0:
        # inn is a multiple of GROUP, which divides BLOCKSIZE: each group lies in one row and has one maximum.
        groups = tl.arange(0, COLS // GROUP)
        group_cols = col0 + groups * GROUP
        group_inside = (rows < out)[:, None] & (group_cols < inn)[None, :]
        position = (wide_rows * row_bytes)[:, None] + (col0 // COLS * (COLS // 2) + groups * (GROUP // 2))[None, :]
        position = position[:, :, None] + tl.arange(0, GROUP // 2)[None, None, :]
        pair = tl.load(packed_ptr + position, mask=group_inside[:, :, None], other=0)
        block = (wide_rows[:, None] * inn + group_cols[None, :]) // BLOCKSIZE
        maxima = _maxima(absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, block, group_inside, NESTED)
    else:
        pair = tl.load(packed_ptr + index // 2, mask=inside, other=0)
        maxima = _maxima(absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, index // BLOCKSIZE, inside, NESTED)

    change = tl.zeros((ROWS, COLS), tl.float32)
    if MERGE:
        for start in range(0, rank, RANKS):
            ranks = start + tl.arange(0, RANKS)
            b_inside = (rows < out)[:, None] & (ranks < rank)[None, :]
            a_inside = (ranks < rank)[:, None] & (cols < inn)[None, :]
            b = tl.load(b_ptr + wide_rows[:, None] * b_stride + ranks[None, :], mask=b_inside, other=0.0)
            a = tl.load(a_ptr + ranks.to(tl.int64)[:, None] * a_stride + cols[None, :], mask=a_inside, other=0.0)
            if WIDE:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            change = tl.dot(b, a, change, input_precision=PRECISION)

    if GROUP > 0:
        first = tl.load(code_ptr + (pair >> 4).to(tl.int32)) * maxima[:, :, None]
        second = tl.load(code_ptr + (pair & 15).to(tl.int32)) * maxima[:, :, None]
        base = tl.reshape(tl.interleave(first, second), (ROWS, COLS))
    else:
        value = tl.where(index % 2 == 0, pair >> 4, pair & 15)
        base = tl.load(code_ptr + value.to(tl.int32)) * maxima
    if MERGE:
        base = base + scaling * change

    tl.store(weight_ptr + index, base.to(weight_ptr.dtype.element_ty), mask=inside)


class Tile(NamedTuple):
    """What one program of the kernel works on: rows x cols of the weight, `ranks` of B @ A at a time."""

    rows: int
    cols: int
    ranks: int
    warps: int
    stages: int


def choose_tile(rank: int, wide: bool, capability: tuple[int, int]) -> Tile:
    """Return the tile for a rank (0: dequantize only). A table and no search: nothing is timed at run time."""
    if rank <= 64 or capability < (8, 0):
        # 7.5 has 64 KiB of shared memory, too little for the large tile.
        return Tile(32, 128, block_of(rank, 16, 32), 4, 2)
    # The larger the tile, the less often A and B are read again.
    return Tile(128, 128, 32 if wide else 64, 8, 2)


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
    if weight.numel() == 0:
        return weight.to(dtype)
    packed = packed.contiguous()
    packed = packed if packed.dtype == torch.uint8 else packed.view(torch.uint8)
    nested = absmax2 is not None
    if offset is not None:
        offset = offset.to(device=device, dtype=torch.float32)
    known = facts(device)
    rank, wide, a_stride, b_stride = 0, False, 0, 0
    if a is not None and b is not None:
        a, b = unit_stride(a), unit_stride(b)
        rank, a_stride, b_stride = a.shape[0], a.stride(0), b.stride(0)
        wide = not known.multiplies(a.dtype, b.dtype)
    tile = tile or choose_tile(rank, wide, known.capability)
    group = min(blocksize, tile.cols)
    start(
        _dequantize_merge_kernel,
        (ceil_div(out, tile.rows) * ceil_div(inn, tile.cols),),
        packed,
        absmax,
        code,
        absmax2 if nested else absmax,
        code2 if nested else code,
        offset if nested else code,
        a if rank else code,
        b if rank else code,
        weight,
        out,
        inn,
        inn // 2,
        rank,
        a_stride,
        b_stride,
        scaling,
        BLOCKSIZE=blocksize,
        NESTED=nested,
        GROUP=group if inn % group == 0 else 0,
        MERGE=rank > 0,
        WIDE=wide,
        PRECISION=known.precision if wide else "ieee",
        ROWS=tile.rows,
        COLS=tile.cols,
        RANKS=tile.ranks,
        num_warps=tile.warps,
        num_stages=tile.stages,
        # bitsandbytes rounds the product before it adds the offset.
        enable_fp_fusion=False,
    )
    return weight.to(dtype)


def _fake(packed, absmax, code, absmax2, code2, offset, blocksize, out, inn, a, b, scaling, dtype):
    return packed.new_empty((out, inn), dtype=dtype)


_operator = register(
    "triton_dequantize_merge(Tensor packed, Tensor absmax, Tensor code, Tensor? absmax2, Tensor? code2, "
    "Tensor? offset, int blocksize, SymInt out, SymInt inn, Tensor? a, Tensor? b, float scaling, ScalarType dtype)"
    " -> Tensor",
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
        b: (out, rank) fp32, bf16 or fp16. Two factors of one 16-bit dtype are multiplied as they are, others in fp32
            (as three tf32 products from compute capability 8.0 on); accumulated in fp32 always.
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
    return _operator(packed, absmax, code, absmax2, code2, offset, blocksize, out, inn, a, b, scaling, dtype)
