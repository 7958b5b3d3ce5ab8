"""4-bit convolutions of classes with a forward of their own: that forward runs, on the dequantized weight."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .conv4bit import Conv1d4bit, Conv2d4bit, Conv4bit, frozen_conv
from .deferred import Product, deferred, plain_geometry
from .dense import carry_settings, check_shape, copy_bias

Self = TypeVar("Self", bound="OwnForward4bit")


class OwnForward4bit(Conv4bit):
    """A 4-bit convolution that computes as `dense_class` does: weight standardisation, padding by the input's size, ...

    It has every attribute, parameter and buffer that the dense module had, under the same names, its weight packed as in
    Conv4bit. The class's forward sees a module of its own class that holds the dequantized weight. Where it hands that
    weight to torch's convolution the dense values don't live until backward; where it does more with it, what autograd
    keeps of that does.

    Attributes:
        dense_class: the class whose forward runs.
    """

    dense_class: type[nn.Module]

    @classmethod
    def from_dense(
        cls: type[Self], module: nn.Module, quant_type: str, blocksize: int, nested: bool, compute_dtype: torch.dtype
    ) -> Self:
        """Return the quantized twin of a convolution, on its device; on meta it has sizes only."""
        new = super().from_dense(module, quant_type, blocksize, nested, compute_dtype)
        new.dense_class = type(module)
        for name, value in vars(module).items():
            if name not in vars(new):
                vars(new)[name] = value
        for name, parameter in module._parameters.items():
            if name not in ("weight", "bias"):
                new.register_parameter(name, _copied(parameter))
        for name, buffer in module._buffers.items():
            persistent = name not in module._non_persistent_buffers_set
            new.register_buffer(name, None if buffer is None else buffer.clone(), persistent)
        new._modules.update(module._modules)
        return new

    def forward(self, input: torch.Tensor, *args: Any, dense_weight: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Input as `dense_class` takes it, any float dtype -> its output in the same dtype.

        Args:
            input: the input.
            args, kwargs: passed on.
            dense_weight: takes the place of the dequantized weight (LoRA's effective one).
        """
        weight = self._frozen_weight() if dense_weight is None else dense_weight
        dense = self._dense(self._computing(weight))
        dense._buffers = {name: self._cast(buffer) for name, buffer in dense._buffers.items()}
        output = dense.forward(input.to(self.compute_dtype), *args, **kwargs)
        return output.to(input.dtype)

    def _frozen_weight(self) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch._C._functorch.get_dynamic_layer_stack_depth():  # type: ignore[attr-defined]
            return self.dequantize(self.compute_dtype)
        return deferred(_Frozen(self))

    def _computing(self, weight: torch.Tensor) -> dict[str, Any]:
        """Return the dense module's parameters in compute_dtype."""
        return {**{name: self._cast(p) for name, p in self._parameters.items()}, "weight": weight}

    def _cast(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor.to(self.compute_dtype) if tensor is not None and tensor.is_floating_point() else tensor

    def _dense(self, parameters: dict[str, Any]) -> Any:
        """Return a module of the dense class with these parameters and the settings, buffers and children of this one."""
        dense = self.dense_class.__new__(self.dense_class)
        state = {name: value for name, value in vars(self).items() if name not in _PACKING}
        state["_buffers"] = {name: b for name, b in self._buffers.items() if name not in _STATISTICS}
        vars(dense).update(state, _parameters=parameters)
        return dense

    def dense_module(self, weight: torch.Tensor) -> nn.Module:
        """Return a new module of the dense class with this weight, frozen, and copies of everything else."""
        check_shape(weight, self.dense_shape)
        new = self._dense({"weight": nn.Parameter(weight.detach(), requires_grad=False), "bias": None})
        # _dense shares its containers with this module.
        for name, value in vars(new).items():
            if isinstance(value, (dict, set)):
                vars(new)[name] = copy.copy(value)
        copy_bias(self, new, weight.dtype)
        for name, parameter in self._parameters.items():
            if name not in ("weight", "bias"):
                new.register_parameter(name, _copied(parameter))
        for name, buffer in new._buffers.items():
            new._buffers[name] = None if buffer is None else buffer.clone()
        carry_settings(self, new)
        return new

    def extra_repr(self) -> str:
        """Return what Conv4bit shows and the class whose forward runs."""
        return f"{super().extra_repr()}, dense_class={self.dense_class.__name__}"


#: What a 4-bit convolution has and the dense module has not.
_PACKING = ("quant_type", "blocksize", "nested", "dense_shape", "compute_dtype", "dense_class")
_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")


def _copied(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


class _Frozen:
    """Stands behind the dequantized weight for one call; see `deferred.Source`."""

    inputs: Sequence[torch.Tensor] = ()

    def __init__(self, layer: OwnForward4bit) -> None:
        self.layer = layer
        self.shape, self.dtype, self.device = layer.dense_shape, layer.compute_dtype, layer.weight.device

    def product(self, call: Product) -> torch.Tensor | None:
        """Return a convolution that unpacks the weight again in backward."""
        dims = len(self.shape) - 2
        settings = None if call.geometry is None else plain_geometry(call.geometry, dims)
        if settings is None or call.x.dim() != dims + 2 or call.x.dtype != self.dtype:
            return None
        return frozen_conv(call.x, call.bias, self.layer, *settings, call.geometry[3])  # type: ignore[index]

    def values(self) -> torch.Tensor:
        """Return the dequantized weight."""
        return self.layer.dequantize(self.dtype)

    def gradients(self, gradient: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """Return nothing: the weight is frozen."""
        return ()


class OwnForwardConv1d4bit(OwnForward4bit, Conv1d4bit):
    """A subclass of nn.Conv1d with a forward of its own, its weight in 4 bits."""


class OwnForwardConv2d4bit(OwnForward4bit, Conv2d4bit):
    """A subclass of nn.Conv2d with a forward of its own, its weight in 4 bits."""
