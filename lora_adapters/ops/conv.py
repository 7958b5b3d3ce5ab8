"""LoRA on a convolution of any geometry: y = conv(x, W) + bias + sum_j s_j B_j conv(x, A_j), B_j on each position.

The same as for linear layers with a convolution for the product, and the groups: h = conv(x, A) has `up_groups` times
rank channels, and each group of output channels takes its own part of them. Where all groups share A (our layers) the
update B A has the shape of W and can be merged into it; where A spans all input channels (stock PEFT) it can't.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .autocast import no_autocast
from .differentiable import once_differentiable
from .dropout import draw_masks, kept_scalings
from .factors import Stack
from .frozen import Dense, FrozenWeight
from .linear import Dtypes


@dataclass(frozen=True)
class Geometry:
    """Stride, zero padding and dilation, one value a dimension; and groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the convolution of x (batch, in, *size) with weight (out, in / groups, *kernel)."""
        zeros = (0,) * len(self.stride)
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, zeros, self.groups)

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wants: tuple[bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of x and of weight, each if wanted. For x's alone only x's shape matters."""
        zeros = (0,) * len(self.stride)
        settings = (self.stride, self.padding, self.dilation, False, zeros, self.groups)
        dx, dw, _ = torch.ops.aten.convolution_backward.default(dy, x, weight, None, *settings, (*wants, False))
        return dx, dw


@dataclass(frozen=True)
class Layer:
    """One convolution, for one call.

    Attributes:
        weight: how its frozen weight is read; None adds the low-rank product to a result that is there already.
        merged: put the update into the weight. Not with dropout; only if the groups share A.
        geometry: of the base.
        down: of conv(x, A).
        up_groups: groups of B.
        shared: every group uses the same A, given once.
        scalings: one factor an adapter. More than one only with up_groups = 1 or a shared A.
        output: dtype of the result.
        dropouts: one probability an adapter; empty where nothing is dropped.
    """

    weight: FrozenWeight | None
    merged: bool
    geometry: Geometry
    down: Geometry
    up_groups: int
    shared: bool
    scalings: tuple[float, ...]
    output: torch.dtype
    dropouts: tuple[float, ...] = ()


def lora_conv(
    x: torch.Tensor, layer: Layer, addend: torch.Tensor | None, factors: Sequence[torch.Tensor], dtypes: Dtypes
) -> torch.Tensor:
    """Return the output (batch, out, *size') for x (batch, in, *size).

    Args:
        x: any float dtype. Backward keeps it as it is, or the cast of it that the products need where that is smaller.
        layer: see Layer.
        addend: the bias (out,); without a weight the base's result; or None.
        factors: A (rank, in / groups, *kernel) and B (out, rank / ..., 1...) of every adapter, in order.
        dtypes: see Dtypes.
    """
    kept = None if layer.weight is None else layer.weight.kept
    return _Conv.apply(x, layer, dtypes, addend, kept, *factors)  # type: ignore[return-value]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layer: Layer,
        dtypes: Dtypes,
        *tensors: Any,
    ) -> torch.Tensor:
        # Not named one by one: torch 2.14's compiler takes a call with as many arguments as forward has names, ctx not
        # counted, for one without ctx.
        addend, kept, *factors = tensors
        if not layer.merged and _merging_is_cheaper(x, layer, dtypes):
            layer = replace(layer, merged=True)
        ctx.layer, ctx.dtypes, ctx.dtype, ctx.draw = layer, dtypes, x.dtype, None
        ctx.addend_dtype = None if addend is None else addend.dtype
        with no_autocast(x.device.type):
            if dtypes.low == dtypes.base and x.element_size() > dtypes.base.itemsize:
                x = x.to(dtypes.base)
            stack = Stack(factors, kept_scalings(layer.scalings, layer.dropouts), dtypes.low)
            kernel = factors[0].shape[1:]
            h = None
            if layer.merged:
                assert layer.weight is not None
                weight = layer.weight.merged(dtypes.base, stack.a, stack.scaled_b, low=dtypes.low)
                bias = None if addend is None else addend.to(dtypes.base)
                y = layer.geometry.convolve(x.to(dtypes.base), weight, bias)
            else:
                masks: Sequence[torch.Tensor | None] = ()
                if layer.dropouts:
                    masks, ctx.draw = draw_masks(x, layer.dropouts, dtypes.low)
                h = _down(x, layer, stack, kernel, masks, dtypes.low)
                if layer.weight is None:
                    assert addend is not None
                    y = addend + _up(_scaled(h, stack, layer), stack.b, layer.up_groups)
                else:
                    bias = None if addend is None else addend.to(dtypes.base)
                    y = layer.geometry.convolve(x.to(dtypes.base), layer.weight.read(dtypes.base), bias)
                    y = y.add_(_up(_scaled(h, stack, layer), stack.b, layer.up_groups))
        ctx.save_for_backward(x, h, kept, *factors)
        return y.to(layer.output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (dy,) = gradients
        layer, dtypes, needs = ctx.layer, ctx.dtypes, ctx.needs_input_grad
        x, h, _, *factors = ctx.saved_tensors
        dx, daddend, own = None, None, [None] * len(factors)
        with no_autocast(x.device.type):
            stack = Stack(factors, kept_scalings(layer.scalings, layer.dropouts), dtypes.low)
            kernel = factors[0].shape[1:]
            masks = ctx.draw.again() if ctx.draw is not None else ()
            if any(needs[5:]):
                h = _down(x, layer, stack, kernel, (), dtypes.low) if h is None else h
                low_dy = dy.to(dtypes.low)
                dh = _scaled(_up_input_gradient(low_dy, stack.b, layer.up_groups), stack, layer)
                db = _up_weight_gradient(low_dy, h, layer.up_groups)
                wants = needs[0] and not layer.merged
                dx, da = _down_backward(dh, x, layer, stack, kernel, masks, dtypes.low, wants)
                own = stack.gradients(da, db)
            elif needs[0] and not layer.merged:
                dh = _scaled(_up_input_gradient(dy.to(dtypes.low), stack.b, layer.up_groups), stack, layer)
                dx, _ = _down_backward(dh, x, layer, stack, kernel, masks, dtypes.low, True)
            if needs[0] and layer.weight is not None:
                if layer.merged:
                    weight = layer.weight.merged(dtypes.base, stack.a, stack.scaled_b, low=dtypes.low)
                else:
                    weight = layer.weight.read(dtypes.base)
                full, _ = layer.geometry.backward(dy.to(dtypes.base), x.to(dtypes.base), weight, (True, False))
                assert full is not None
                # Summed in the wider dtype, as autograd sums what the base and the adapter give an input.
                dx = full if dx is None else full.to(torch.promote_types(full.dtype, ctx.dtype)).add_(dx)
            if needs[3]:
                sums = [0, *range(2, dy.dim())]
                daddend = (dy if layer.weight is None else dy.sum(sums)).to(ctx.addend_dtype)
            dx = dx.to(ctx.dtype) if dx is not None and needs[0] else None
        return (dx, None, None, daddend, None, *own)


#: Positions for each output channel from which merging an fp32 weight costs less than three more convolutions with A.
_POSITIONS = 4


def _merging_is_cheaper(x: torch.Tensor, layer: Layer, dtypes: Dtypes) -> bool:
    """Return True where W + B A is worth making for one call: W is fp32, which holds the sum, and the image is large."""
    exact = isinstance(layer.weight, Dense) and layer.weight.weight.dtype is dtypes.base is torch.float32
    if not exact or x.device.type != "cpu" or not layer.shared or layer.dropouts:
        return False
    out, width = layer.weight.weight.shape[:2]  # type: ignore[union-attr]
    positions = x.numel() // (width * layer.geometry.groups * math.prod(layer.geometry.stride))
    return positions >= _POSITIONS * out


def _kernels(a: torch.Tensor, layer: Layer, kernel: torch.Size) -> torch.Tensor:
    """Return the weight of conv(x, A): (rank, ...) -> (groups * rank, ...) where the groups share A."""
    weight = a.view(len(a), *kernel)
    return weight.repeat(layer.up_groups, *[1] * len(kernel)) if layer.shared and layer.up_groups > 1 else weight


def _down(
    x: torch.Tensor,
    layer: Layer,
    stack: Stack,
    kernel: torch.Size,
    masks: Sequence[torch.Tensor | None],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return h (batch, up_groups * ranks, *size'), or (batch, rank, *size') where A is not shared."""
    if not masks:
        return layer.down.convolve(x.to(dtype), _kernels(stack.a, layer, kernel))
    parts = [
        layer.down.convolve(x.to(dtype) if mask is None else x.to(dtype) * mask, _kernels(a, layer, kernel))
        for a, mask in zip(stack.each_a, masks, strict=True)
    ]
    return _side_by_side(parts, layer.up_groups)


def _scaled(h: torch.Tensor, stack: Stack, layer: Layer) -> torch.Tensor:
    return stack.scaled(h, layer.up_groups, _own_ranks(stack, layer))


def _side_by_side(parts: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
    """Put each adapter's channels beside the others' within every group."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(1, (groups, -1)) for part in parts], 2).flatten(1, 2)


def _down_backward(
    dh: torch.Tensor,
    x: torch.Tensor,
    layer: Layer,
    stack: Stack,
    kernel: torch.Size,
    masks: Sequence[torch.Tensor | None],
    dtype: torch.dtype,
    wants_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return dX through A (None if unwanted), and dA (ranks, in / groups * prod(kernel))."""
    if not masks:
        weight = _kernels(stack.a, layer, kernel)
        dx, dw = layer.down.backward(dh, x.to(dtype), weight, (wants_x, True))
        assert dw is not None
        return dx, _sum_groups(dw, layer)
    total, das = None, []
    parts = dh.unflatten(1, (layer.up_groups, -1)).split(_own_ranks(stack, layer), 2)
    for own, a, mask in zip(parts, stack.each_a, masks, strict=True):
        own, inputs = own.flatten(1, 2), x.to(dtype) if mask is None else x.to(dtype) * mask
        dx, dw = layer.down.backward(own, inputs, _kernels(a, layer, kernel), (wants_x, True))
        assert dw is not None
        das.append(_sum_groups(dw, layer))
        if dx is not None:
            dx = dx if mask is None else dx * mask
            total = dx if total is None else total + dx
    return total, torch.cat(das)


def _own_ranks(stack: Stack, layer: Layer) -> list[int]:
    """Return how many channels each adapter has in a group of h."""
    return stack.ranks if layer.shared or layer.up_groups == 1 else [rank // layer.up_groups for rank in stack.ranks]


def _sum_groups(dw: torch.Tensor, layer: Layer) -> torch.Tensor:
    if layer.shared and layer.up_groups > 1:
        dw = dw.unflatten(0, (layer.up_groups, -1)).sum(0)
    return dw.flatten(1)


def _up(h: torch.Tensor, b: torch.Tensor, groups: int) -> torch.Tensor:
    """h (batch, groups * rank, *size), b (out, rank) -> (batch, out, *size)."""
    parts = h.flatten(2).unflatten(1, (groups, -1))
    y = torch.matmul(b.unflatten(0, (groups, -1)), parts)
    return y.flatten(1, 2).unflatten(2, h.shape[2:])


def _up_input_gradient(dy: torch.Tensor, b: torch.Tensor, groups: int) -> torch.Tensor:
    parts = dy.flatten(2).unflatten(1, (groups, -1))
    dh = torch.matmul(b.unflatten(0, (groups, -1)).transpose(1, 2), parts)
    return dh.flatten(1, 2).unflatten(2, dy.shape[2:])


def _up_weight_gradient(dy: torch.Tensor, h: torch.Tensor, groups: int) -> torch.Tensor:
    rows = dy.flatten(2).unflatten(1, (groups, -1))
    columns = h.flatten(2).unflatten(1, (groups, -1))
    if rows.is_cuda and rows.itemsize == 2:
        # Not rounded before the images are summed.
        pairs = rows.flatten(0, 1), columns.transpose(2, 3).flatten(0, 1)
        return torch.bmm(*pairs, out_dtype=torch.float32).unflatten(0, (-1, groups)).sum(0).flatten(0, 1)
    return torch.matmul(rows, columns.transpose(2, 3)).sum(0).flatten(0, 1)
