"""A Linear4bit for the sizes that bitsandbytes gets wrong on the CPU. Importing this module imports bitsandbytes."""

from __future__ import annotations

from typing import Any

import bitsandbytes.nn
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import primitives


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + bias for a packed, frozen W, which is unpacked once in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, packed: torch.Tensor, state: Any) -> torch.Tensor:
        """x (..., in) -> y (..., out)."""
        ctx.save_for_backward(packed)
        ctx.state = state
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, primitives.dequantize(packed, state, state.shape, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return dX = dY W and the bias gradient; W has none."""
        (packed,) = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ primitives.dequantize(packed, ctx.state, ctx.state.shape, dy.dtype)
        if ctx.needs_input_grad[1]:
            dbias = dy.sum(list(range(dy.dim() - 1)))
        return dx, dbias, None, None


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """bitsandbytes' Linear4bit, with a forward on the CPU that is right for every size.

    Where in_features is no multiple of the block size (96, with 64), bitsandbytes 0.50 dequantizes to wrong weights on
    CPUs with AVX512, in training too: its kernel takes every row to begin a new block. Here the weight is dequantized
    as one row. On other devices the forward is bitsandbytes' own; everything else is, everywhere, the class's name
    included, by which other packages recognise it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in), any float dtype -> (..., out) in the same dtype, computed in compute_dtype."""
        state = getattr(self.weight, "quant_state", None)
        if x.device.type != "cpu" or state is None or getattr(state, "packing_format_for_cpu", False):
            return super().forward(x)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        output = _FrozenLinear.apply(x.to(dtype), bias, self.weight, state)
        assert isinstance(output, torch.Tensor)
        return output.to(x.dtype)


def is_mishandled(in_features: int, blocksize: int) -> bool:
    """True for the sizes that need this class."""
    return in_features % blocksize != 0


def mend(layer: Any) -> bool:
    """Turn a stock Linear4bit of such a size into this class, in place. Return False if it needs it and can't be."""
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    if state is None or not is_mishandled(layer.in_features, state.blocksize) or isinstance(layer, Linear4bit):
        return True
    stock = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.LinearNF4, bitsandbytes.nn.LinearFP4)
    if type(layer) not in stock:
        return False
    layer.__class__ = Linear4bit
    return True
