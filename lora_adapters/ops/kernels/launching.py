"""What every launcher needs: facts of the device, the current device, and the registration as an operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Registered here and not with torch.library.custom_op, which costs every call several times as much Python.
_LIBRARY = torch.library.Library("lora_adapters", "FRAGMENT")


class DeviceFacts(NamedTuple):
    """What the choice of tiles depends on."""

    processors: int
    capability: tuple[int, int]
    tensor_dtypes: tuple[torch.dtype, ...]  # what Triton's products take besides fp32
    shared: int  # bytes of shared memory that one program may use

    def stages(self, stage_bytes: int) -> int:
        """Return how many loads of this size to keep in flight: at most 4, and what shared memory has room for."""
        return max(1, min(4, min(160 << 10, self.shared - (8 << 10)) // stage_bytes))

    def multiplies(self, *dtypes: torch.dtype) -> bool:
        """Return whether operands of these dtypes are multiplied as they are; if not, they are as fp32."""
        return dtypes[0] in self.tensor_dtypes and all(dtype == dtypes[0] for dtype in dtypes)

    @property
    def precision(self) -> str:
        """How fp32 operands are multiplied: three tf32 products (nearly fp32's accuracy), or plain fp32."""
        return "tf32x3" if self.capability >= (8, 0) else "ieee"


@functools.cache
def facts(device: torch.device) -> DeviceFacts:
    """Return the facts of a device. Triton has no tensor-core products below 8.0; its interpreter has no right bf16."""
    if device.type != "cuda":
        return DeviceFacts(8, (7, 5), (torch.float16,), 64 << 10)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    dtypes = (torch.float16, torch.bfloat16) if capability >= (8, 0) else ()
    return DeviceFacts(properties.multi_processor_count, capability, dtypes, properties.shared_memory_per_block_optin)


def written(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that kernels write for results of `dtype`. The interpreter truncates bf16 instead of rounding."""
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


def start(kernel: Any, grid: tuple[int, ...], first: torch.Tensor, *arguments: Any, **settings: Any) -> None:
    """Launch a kernel over a grid on the device of its first argument."""
    device = first.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](first, *arguments, **settings)
        return
    with torch.cuda.device(device):
        kernel[grid](first, *arguments, **settings)


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """Return a matrix whose rows are contiguous, the same one if it is; the rows may lie apart."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def ceil_div(count: int, size: int) -> int:
    """Return how many pieces of `size` cover `count`."""
    return -(-count // size)


def block_of(count: int, least: int, most: int) -> int:
    """Return the least power of two that covers `count`, within bounds."""
    return max(least, min(most, 1 << max(count - 1, 0).bit_length()))


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define lora_adapters::<schema>, so that torch.compile, fake tensors and make_fx see one opaque call.

    The operator has no derivative: it is called inside autograd functions, whose forward runs without gradients.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"lora_adapters::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.lora_adapters, name).default
