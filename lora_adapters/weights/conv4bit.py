"""Convolutions whose weight is held in 4 bits. bitsandbytes has none, so these are built on its primitives."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv1d_input, conv2d_input

from ..errors import UnsupportedError
from . import primitives
from .dense import carry_settings, check_shape, copy_bias

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

Self = TypeVar("Self", bound="Conv4bit")
_CONV = {1: F.conv1d, 2: F.conv2d}
_CONV_INPUT = {1: conv1d_input, 2: conv2d_input}


class _FrozenConv(torch.autograd.Function):
    """y = conv(x, W) + bias for a packed, frozen W, which is unpacked once in forward and again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: Conv4bit, geometry: tuple[Any, ...]
    ) -> torch.Tensor:
        """x (batch, in, *size) -> y (batch, out, *size'); geometry is stride, padding, dilation and groups."""
        # The packed tensors are saved so that autograd notices if someone writes to them before backward.
        names = list(layer.statistics)
        ctx.save_for_backward(layer.weight, *layer.statistics.values())
        ctx.layer, ctx.names, ctx.geometry, ctx.size = layer, names, geometry, x.shape
        weight = layer.dequantize(x.dtype)
        off = nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
        with off:
            return _CONV[x.dim() - 2](x, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return dX = conv_transpose(dY, W) and the bias gradient; W has none."""
        (dy,) = gradients
        layer, (packed, *statistics) = ctx.layer, ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            state = layer.quant_state(dict(zip(ctx.names, statistics, strict=True)))
            weight = primitives.dequantize(packed, state, layer.dense_shape, dy.dtype)
            dx = _CONV_INPUT[dy.dim() - 2](ctx.size, weight, dy, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            dbias = dy.sum([0, *range(2, dy.dim())])
        return dx, dbias, None, None


def frozen_conv(
    x: torch.Tensor, bias: torch.Tensor | None, layer: Conv4bit, stride: Any, padding: Any, dilation: Any, groups: int
) -> torch.Tensor:
    """Return the convolution of x (batch, in, *size) with a layer's weight, in x's dtype and this geometry."""
    return _FrozenConv.apply(x, bias, layer, (stride, padding, dilation, groups))  # type: ignore[return-value]


def with_padding(conv: Any, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return the input and the zero padding left for the convolution, having padded x where zeros won't do.

    Args:
        conv: an nn.Conv1d or nn.Conv2d, whose padding and padding_mode count.
        x: (batch, in, *size).
    """
    if conv.padding == "valid":
        pairs = [(0, 0)] * len(conv.kernel_size)
    elif conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(int(p), int(p)) for p in conv.padding]
    if conv.padding_mode == "zeros" and all(before == after for before, after in pairs):
        return x, tuple(before for before, _ in pairs)
    amounts = [amount for pair in reversed(pairs) for amount in pair]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, amounts, mode=mode), (0,) * len(pairs)


class Conv4bit(nn.modules.conv._ConvNd):
    """What Conv1d4bit and Conv2d4bit share.

    The flattened weight (out, in / groups, *kernel) is packed two values a byte into the parameter `weight`
    ((numel + 1) // 2, 1), uint8, frozen. The statistics are buffers: absmax, quant_map and, if nested, nested_absmax,
    nested_quant_map, nested_offset (see `primitives.nbytes` for sizes and dtypes), so that state_dict, safetensors,
    deepcopy, pickle and moving between devices need nothing special. The layer computes in `compute_dtype` and returns
    its input's dtype; casting the module (`.to(dtype)`, `.half()`) changes compute_dtype and the bias, nothing else.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: values that share one maximum.
        nested: whether the maxima are quantized too.
        dense_shape: shape of the dense weight.
    """

    def _pack_weight(
        self, quant_type: str, blocksize: int, nested: bool, device: torch.device | str | None, dtype: Any
    ) -> None:
        """Replace the dense meta-device weight that the constructor of nn.Conv made by packed zeros on `device`."""
        primitives.check_settings(quant_type, blocksize)
        self.quant_type, self.blocksize, self.nested = quant_type, blocksize, nested
        self.dense_shape = self.weight.shape
        self.compute_dtype: torch.dtype = dtype or torch.get_default_dtype()
        place = torch.empty(0, device=device).device
        count = (self.dense_shape.numel() + 1) // 2
        self.weight = nn.Parameter(torch.zeros(count, 1, dtype=torch.uint8, device=place), requires_grad=False)
        if self.bias is not None:
            self.bias = nn.Parameter(torch.zeros(self.out_channels, dtype=self.compute_dtype, device=place))
        state = primitives.empty_state(self.dense_shape, self.compute_dtype, quant_type, blocksize, nested, place)
        for name, tensor in primitives.state_tensors(state).items():
            # One value is a vector of length 1 here, so that its bytes can be viewed; see _apply.
            self.register_buffer(name, torch.zeros(tensor.numel(), dtype=tensor.dtype, device=place))
        if place.type != "meta":
            functional = primitives.bitsandbytes().functional
            self.get_buffer("quant_map").copy_(functional.get_4bit_type(quant_type, device=place))
            if nested:
                self.get_buffer("nested_quant_map").copy_(functional.create_dynamic_map())

    @classmethod
    def from_dense(
        cls: type[Self], module: nn.Module, quant_type: str, blocksize: int, nested: bool, compute_dtype: torch.dtype
    ) -> Self:
        """Return the quantized twin of an nn.Conv1d or nn.Conv2d, on its device; on meta it has sizes only."""
        dense: Any = module
        build: Any = cls  # the base class's constructor is nn.Conv's private one
        shape = (dense.in_channels, dense.out_channels, dense.kernel_size, dense.stride, dense.padding, dense.dilation)
        rest = (dense.groups, dense.bias is not None, dense.padding_mode, dense.weight.device, compute_dtype)
        new = build(*shape, *rest, quant_type=quant_type, blocksize=blocksize, nested=nested)
        carry_settings(dense, new)
        copy_bias(dense, new)
        if dense.weight.device.type != "meta":
            new.quantize(dense.weight)
        return new

    @property
    def statistics(self) -> dict[str, torch.Tensor]:
        """The buffers that the packed weight needs, by name."""
        names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")
        return {name: self.get_buffer(name) for name in (names if self.nested else names[:2])}

    def quant_state(self, tensors: dict[str, torch.Tensor] | None = None) -> QuantState:
        """Return bitsandbytes' description of the packed weight: over the layer's own tensors, or over these."""
        tensors = self.statistics if tensors is None else tensors
        state_class = primitives.bitsandbytes().functional.QuantState
        state2, offset = None, None
        if self.nested:
            state2 = state_class(
                absmax=tensors["nested_absmax"],
                code=tensors["nested_quant_map"],
                blocksize=primitives.NESTED_BLOCKSIZE,
                dtype=torch.float32,
            )
            offset = tensors["nested_offset"].reshape(())
        return state_class(
            absmax=tensors["absmax"],
            shape=self.dense_shape,
            code=tensors["quant_map"],
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.compute_dtype,
            offset=offset,
            state2=state2,
        )

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense weight (out, in / groups, *kernel)."""
        return primitives.dequantize(self.weight, self.quant_state(), self.dense_shape, dtype)

    @torch.no_grad()
    def quantize(self, weight: torch.Tensor) -> None:
        """Pack a dense weight of `dense_shape` into this layer, in place."""
        check_shape(weight, self.dense_shape)
        values = weight.to(self.weight.device)
        packed, state = primitives.quantize(values, self.quant_type, self.blocksize, self.nested)
        self.weight.copy_(packed)
        for name, tensor in primitives.state_tensors(state).items():
            self.get_buffer(name).copy_(tensor.reshape(-1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Input (batch, in, *size) or (in, *size), any float dtype -> output in the same dtype."""
        x = input.to(self.compute_dtype)
        batched = x.dim() == self.weight_dims
        x, padding = with_padding(self, x if batched else x.unsqueeze(0))
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        output = frozen_conv(x, bias, self, self.stride, padding, self.dilation, self.groups)
        return (output if batched else output.squeeze(0)).to(input.dtype)

    @property
    def weight_dims(self) -> int:
        """Dimensions of the dense weight, and so of a batched input."""
        return len(self.dense_shape)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Let moves reach every tensor, and casts only the bias and `compute_dtype`: fp32 statistics stay fp32."""
        device = self.weight.device
        if fn(torch.empty(0, dtype=torch.uint8, device=device)).dtype != torch.uint8:
            raise UnsupportedError("The packed bytes of a 4-bit convolution can't be cast; use .to(dtype) instead.")
        compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        dtypes = {name: buffer.dtype for name, buffer in self.statistics.items()}
        for name in dtypes:
            self._buffers[name] = self.get_buffer(name).view(torch.uint8)
        try:
            super()._apply(fn, recurse)
        finally:
            for name, dtype in dtypes.items():
                self._buffers[name] = self.get_buffer(name).view(dtype)
        self.compute_dtype = compute_dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse tensors of another format before any of this layer is overwritten; else load as every module does."""
        problems = self._format_problems(state_dict, prefix)
        error_msgs.extend(problems)
        if not problems:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def _format_problems(self, state_dict: Any, prefix: str) -> list[str]:
        """Return what in a state_dict shows that it was saved with other quantization settings.

        A plain load would cast such tensors, or unpack the values with the wrong code table, and say nothing.
        """
        problems = []
        for name, own in {"weight": self.weight, **self.statistics}.items():
            given = state_dict.get(prefix + name)
            if given is not None and given.dtype != own.dtype:
                problems.append(f"{prefix}{name} is {given.dtype}, not {own.dtype}: other quantization settings")
        table = state_dict.get(prefix + "quant_map")
        if table is not None and table.device.type != "meta":
            expected = primitives.bitsandbytes().functional.get_4bit_type(self.quant_type, device="cpu")
            if table.shape != expected.shape or not torch.equal(table.cpu(), expected):
                problems.append(f"{prefix}quant_map is not the {self.quant_type} code table")
        return problems

    def extra_repr(self) -> str:
        """Return what nn.Conv shows and the format."""
        return f"{super().extra_repr()}, quant_type={self.quant_type}"


class Conv1d4bit(Conv4bit, nn.Conv1d):
    """nn.Conv1d with its weight in 4 bits. A new one holds zeros: load, `quantize` or use `from_dense`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        nested: bool = True,
    ) -> None:
        settings = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        nn.Conv1d.__init__(self, *settings, device="meta")
        self._pack_weight(quant_type, blocksize, nested, device, dtype)


class Conv2d4bit(Conv4bit, nn.Conv2d):
    """nn.Conv2d with its weight in 4 bits. A new one holds zeros: load, `quantize` or use `from_dense`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        nested: bool = True,
    ) -> None:
        settings = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        nn.Conv2d.__init__(self, *settings, device="meta")
        self._pack_weight(quant_type, blocksize, nested, device, dtype)


class Conv4bitStore:
    """The store of a Conv1d4bit or Conv2d4bit."""

    def __init__(self, module: Conv4bit) -> None:
        self.format = module.quant_type
        self.module: nn.Module = module
        self._layer = module

    @property
    def shape(self) -> torch.Size:
        """(out, in / groups, *kernel)."""
        return self._layer.dense_shape

    @property
    def dtype(self) -> torch.dtype:
        """The layer's compute dtype."""
        return self._layer.compute_dtype

    @property
    def device(self) -> torch.device:
        """Device of the packed weight."""
        return self._layer.weight.device

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and its statistics."""
        return self._layer.weight.nbytes + sum(tensor.nbytes for tensor in self._layer.statistics.values())

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the dequantized weight."""
        return self._layer.dequantize(dtype or self.dtype)

    def write(self, weight: torch.Tensor) -> None:
        """Quantize a dense weight into the layer, in place."""
        self._layer.quantize(weight)

    def dense_module(self, weight: torch.Tensor) -> nn.Module:
        """Return a module of the class that was quantized with this weight, frozen, and a copy of the bias in its dtype."""
        check_shape(weight, self.shape)
        layer = self._layer
        own = getattr(layer, "dense_module", None)  # a class with a forward of its own
        if own is not None:
            return own(weight)
        base: Any = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
        settings: Any = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        new = base(*settings, layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode, device="meta")
        new.weight = nn.Parameter(weight.detach(), requires_grad=False)
        carry_settings(layer, new)
        copy_bias(layer, new, weight.dtype)
        return new
