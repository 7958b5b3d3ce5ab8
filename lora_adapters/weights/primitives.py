"""bitsandbytes' primitives, as the stores use them: blocks of 4-bit values, and rows of int8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import MissingDependencyError, RequestError

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Dtypes the primitives quantize from and dequantize into.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: Block size of the second quantization, of the block maxima. bitsandbytes computes with no other.
NESTED_BLOCKSIZE = 256
#: The largest magnitude an int8 weight may come from: bitsandbytes casts to fp16 first.
FP16_MAX = torch.finfo(torch.float16).max


def bitsandbytes() -> Any:
    """Import bitsandbytes.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import bitsandbytes as package
        import bitsandbytes.functional
        import bitsandbytes.nn
    except ImportError as error:
        raise MissingDependencyError(
            f"Quantizing with nf4, fp4 or int8 needs bitsandbytes ({error}): pip install 'lora-adapters[bnb]'"
        ) from error
    return package


def check_settings(quant_type: str, blocksize: int) -> None:
    """Raise RequestError for a format or block size that the primitives don't have."""
    if quant_type not in QUANT_TYPES:
        raise RequestError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}.")
    if blocksize not in BLOCKSIZES:
        raise RequestError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize!r}.")


def blocks(count: int, blocksize: int) -> int:
    """Return the number of blocks that `count` values fill, the last one perhaps in part."""
    return -(-count // blocksize)


def nbytes(numel: int, blocksize: int, nested: bool) -> int:
    """Return the bytes of `numel` values in 4 bits with their statistics, as bitsandbytes stores them.

    Two values a byte, one maximum a block, 16 fp32 code values. The maxima are fp32, or, nested: uint8, with one fp32
    maximum for each 256 of them, one fp32 offset, and 256 fp32 code values of their own.
    """
    count = blocks(numel, blocksize)
    statistics = count + 4 * blocks(count, NESTED_BLOCKSIZE) + 4 + 4 * 256 if nested else 4 * count
    return (numel + 1) // 2 + statistics + 4 * 16


def state_tensors(state: QuantState) -> dict[str, torch.Tensor]:
    """Return the tensors of a quantization state by bitsandbytes' own names (nested ones only if it is nested)."""
    tensors = {"absmax": state.absmax, "quant_map": state.code}
    if state.nested:
        assert state.state2 is not None
        tensors |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}
        tensors["nested_offset"] = state.offset
    return tensors


def quantize(
    weight: torch.Tensor, quant_type: str, blocksize: int, nested: bool, storage: torch.dtype = torch.uint8
) -> tuple[torch.Tensor, QuantState]:
    """Pack a dense weight of any shape, row by row.

    Args:
        weight: (any shape) fp32, bf16 or fp16; another dtype is quantized from fp32.
        quant_type: "nf4" or "fp4".
        blocksize: values that share one maximum.
        nested: quantize the maxima too.
        storage: dtype the packed bytes are shown as (FSDP wants the model's float dtype).

    Returns:
        packed ((numel + 1) // 2 / itemsize of storage, 1) and its state.
    """
    functional = bitsandbytes().functional
    values = weight.detach().contiguous()
    if values.dtype not in FLOATS:
        values = values.float()
    return functional.quantize_4bit(
        values, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )


def empty_state(
    shape: torch.Size, dtype: torch.dtype, quant_type: str, blocksize: int, nested: bool, device: torch.device
) -> QuantState:
    """Return a state whose tensors have the right sizes and no values: what a meta-device module holds."""
    state_class = bitsandbytes().functional.QuantState
    count = blocks(shape.numel(), blocksize)
    state2, offset = None, None
    if nested:
        state2 = state_class(
            absmax=torch.empty(blocks(count, NESTED_BLOCKSIZE), device=device),
            blocksize=NESTED_BLOCKSIZE,
            code=torch.empty(256, device=device),
            dtype=torch.float32,
        )
        # On the CPU even for meta: bitsandbytes calls .item() on it for state_dict.
        offset = torch.zeros((), device="cpu" if device.type == "meta" else device)
    return state_class(
        absmax=torch.empty(count, dtype=torch.uint8 if nested else torch.float32, device=device),
        shape=shape,
        code=torch.empty(16, device=device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=dtype,
        offset=offset,
        state2=state2,
    )


def dequantize(packed: torch.Tensor, state: QuantState, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return the dense weight of `shape` that `packed` and its state hold; see `unpack`."""
    described: Any = state
    return unpack(packed, state.absmax, nested_of(state), described.blocksize, described.quant_type, shape, dtype)


def nested_of(state: QuantState) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return (maxima, code values, offset) of the block maxima's own quantization, None if they are plain fp32."""
    if not state.nested:
        return None
    assert state.state2 is not None
    assert state.offset is not None
    return state.state2.absmax, state.state2.code, state.offset


def unpack(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    blocksize: int,
    quant_type: str,
    shape: torch.Size,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the dense weight of `shape`: each value is maximum * code in fp32, rounded once to `dtype`.

    Equal to `bitsandbytes.functional.dequantize_4bit` bit for bit, where that is right. The values are asked for as one
    row of even length, because bitsandbytes takes each row to begin a new block on CPUs with AVX512 (wrong weights for
    rows that are no multiple of the block size), compiles a new kernel for every shape with an odd last dimension on
    any CPU (seconds for each 3x3 convolution), and transposes what has a single packed byte.
    """
    ops = torch.ops.bitsandbytes
    if nested is not None:
        maxima, code, offset = nested
        absmax = ops.dequantize_blockwise.default(absmax, maxima, code, NESTED_BLOCKSIZE, torch.float32) + offset
    numel = shape.numel()
    row = (1, numel + numel % 2)
    kind = dtype if dtype in FLOATS else torch.float32
    values = ops.dequantize_4bit.default(packed.detach(), absmax, blocksize, quant_type, row, kind)
    return values.reshape(-1)[:numel].reshape(shape).to(dtype)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (int8 (out, in), fp32 row maxima (out,)) of a dense weight, as bitsandbytes' Int8Params makes them.

    Raises:
        RequestError: the weight is not finite in fp16.
    """
    values = weight.detach().contiguous().to(torch.float16)
    if not all(torch.isfinite(limit) for limit in values.aminmax()):
        raise RequestError(f"int8 needs finite weights of at most {FP16_MAX:.0f}; bitsandbytes goes through fp16.")
    quantized, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(values)
    return quantized, scales
