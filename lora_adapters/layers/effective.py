"""LoRA layers that give others their effective weight, W + sum_i s_i B_i A_i.

Two kinds of code multiply by a weight in their own words, and an adapter beside the layer would do nothing there, or the
wrong thing: a model that reads `layer.weight` without calling the layer, and a base class with a forward of its own (weight
standardisation, padding by the input's size). Both get the effective weight, so what they compute is what they would
compute after merging. `F.linear` and `F.conv2d` with it run through `ops`, as a call of the layer would: without a
gradient of the weight's size, and dropout included. Anything else they do with it makes its values.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from ..errors import UnsupportedError
from ..ops.autocast import autocast_dtype
from ..ops.choice import linear_layers
from ..ops.conv import Geometry, Layer, lora_conv
from ..ops.effective import effective_gradients, effective_weight
from ..ops.frozen import FrozenWeight
from ..ops.linear import Dtypes, Member
from ..weights.conv4bit_own import OwnForward4bit
from ..weights.deferred import Product, deferred, plain_geometry
from . import conv, linear
from .fused import _transforms, frozen_weight, product_dtypes, weight_dtype
from .routes import Route, active, runs_own_forward, weight_route, why_parent


class EffectiveWeight(nn.Module):
    """Mixin before one of our layer classes; see the module."""

    #: Tells planning and `routes` that this layer is right for bases whose weight is read.
    effective = True

    @property
    def weight(self: Any) -> torch.Tensor:
        """The weight that calls of this layer compute with: of the base's logical shape, and never packed.

        Gradients that reach it go on to the factors. With dropout on it can only be multiplied by an input (F.linear,
        F.conv1d, F.conv2d): anything else raises UnsupportedError.
        """
        with _alone():
            names = [] if self._disable_adapters or self.merged_adapters else active(self)
            if names:
                return self._effective(names)
            base = self._modules["base_layer"]
            chosen, weight, dtype = readable(base)
            return base.weight if chosen.reads == "dense" else weight.read(dtype)

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the base class's result with the effective weight in the place of its own.

        Raises:
            UnsupportedError: other adapters for other rows (`adapter_names`), where the class has a forward of its own.
        """
        with _alone():
            base = self._modules["base_layer"]
            if not self._disable_adapters and not self.merged_adapters and runs_own_forward(base):
                return self._substituted(base, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)

    def _substituted(self: Any, base: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise UnsupportedError(
                f"Rows of one batch can't have adapters of their own (adapter_names) in a {type(base).__name__}, whose own "
                "forward runs on one effective weight. Run the adapters one after the other (set_adapter)."
            )
        if not (names := active(self)):
            return base(x, *args, **kwargs)
        return _call_with(base, self._effective(names), (x, *args), kwargs)

    def _effective(self: Any, names: list[str]) -> torch.Tensor:
        """Return the effective weight, deferred where only autograd and the code that asked look on."""
        base = self._modules["base_layer"]
        weight = base._parameters["weight"]
        watched = (
            torch.compiler.is_compiling()
            or _transforms()
            or torch._C._get_tracing_state() is not None
            or forward_ad._current_level >= 0
        )
        if not torch.compiler.is_compiling() and is_fx_symbolic_tracing():
            raise UnsupportedError(
                "torch.fx would record the weight with the adapter in it as a constant: trace the model before you attach, "
                "or after adapter.merge(unload=True)."
            )
        plain = all(type(self.scaling[name]) in (float, int) for name in names)
        if watched or not plain or weight.requires_grad:
            self.refuse_dropped(names)
            _, frozen, dtype = readable(base)
            return effective_weight(frozen, self.factor_tensors(names), self.scalings(names), dtype)
        return deferred(_Adapted(self, names))

    def refuse_dropped(self: Any, names: list[str]) -> None:
        """Raise UnsupportedError if dropout is on: it acts on an input, which the weight alone doesn't show."""
        dropouts = [self._modules["lora_dropout"]._modules[name] for name in names]
        if any(type(layer) is not nn.Identity and layer.training and getattr(layer, "p", 1.0) for layer in dropouts):
            raise UnsupportedError(
                f"This adapter has dropout, which acts on a layer's input, but the weight of a "
                f"{type(self._modules['base_layer']).__name__} was read by itself (or by a compiler, an exporter, a "
                "transform). Attach with dropout=0.0, or leave this layer out (exclude=[...])."
            )


class _Adapted:
    """Stands behind a layer's weight for one reading of it; see `weights.deferred.Source`.

    It holds what it reads: while the base's own forward runs, the deferred weight is in the place of the base's.
    """

    def __init__(self, layer: Any, names: list[str]) -> None:
        base = layer._modules["base_layer"]
        self.layer, self.names, self.scalings = layer, names, layer.scalings(names)
        self.inputs: Sequence[torch.Tensor] = layer.factor_tensors(names)
        self.route, self.frozen, self.dtype = readable(base)
        self.device = base._parameters["weight"].device
        self.shape = torch.Size((len(self.inputs[1]), *self.inputs[0].shape[1:]))

    def product(self, call: Product) -> torch.Tensor | None:
        """Return the product by the fused ops; None where they are not exact, and for anything odd in the call."""
        layer, x = self.layer, call.x
        if not layer.fused or why_parent(layer, self.names) or layer._why_not(x, self.names):
            return None
        auto = autocast_dtype(x.device.type)
        if auto is not None and x.dtype not in (torch.float32, auto):
            return None
        if call.bias is not None and call.bias.shape != self.shape[:1]:
            return None
        dtypes = product_dtypes(layer._modules["base_layer"], self.route.reads, self.dtype, x, auto)
        return None if dtypes is None else layer.multiplied(call, self, *dtypes, auto or self.inputs[0].dtype)

    def values(self) -> torch.Tensor:
        """Return W + sum_i s_i B_i A_i."""
        self.layer.refuse_dropped(self.names)
        with torch.no_grad():
            return effective_weight(self.frozen, self.inputs, self.scalings, self.dtype)

    def gradients(self, gradient: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """Return dA and dB of every adapter."""
        return effective_gradients(gradient, self.inputs, self.scalings)


def readable(base: Any) -> tuple[Route, FrozenWeight, torch.dtype]:
    """Return the way in which a base module's weight is read, the weight, and its dtype."""
    chosen = weight_route(base)
    weight = frozen_weight(base, chosen.reads)
    if weight is None:
        raise UnsupportedError(f"The weight of a {type(base).__name__} can't be read: nobody knows how it is stored.")
    return chosen, weight, weight_dtype(base, chosen.reads)


#: Held while a base module has another weight than its own, and by whoever looks at its weight: a server may run one
#: model in several threads.
_swapping = threading.RLock()


def _alone() -> AbstractContextManager[Any]:
    """Return the lock; compiled code holds the other weight in a variable, and needs none."""
    return nullcontext() if torch.compiler.is_compiling() else _swapping


def _call_with(base: nn.Module, weight: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
    """Call a base module, hooks included, with another weight."""
    if isinstance(base, OwnForward4bit):
        return base(*args, dense_weight=weight, **kwargs)
    own = base._parameters["weight"]
    base._parameters["weight"] = weight  # type: ignore[assignment]
    try:
        return base(*args, **kwargs)
    finally:
        base._parameters["weight"] = own


class EffectiveLinear(EffectiveWeight):
    """For layers whose weight is (out, in)."""

    def multiplied(
        self: Any, call: Product, weight: _Adapted, compute: torch.dtype, output: torch.dtype, low: torch.dtype
    ) -> torch.Tensor | None:
        """Return F.linear with the effective weight."""
        if call.geometry is not None:
            return None
        dropouts = self._dropouts(weight.names)
        merged = weight.route.path == "merged" and not dropouts
        member = Member(weight.frozen, merged, weight.scalings, output, dropouts)
        return linear_layers(call.x, (member,), (call.bias,), weight.inputs, Dtypes(compute, low))[0]


class Linear(EffectiveLinear, linear.Linear):
    """LoRA on an nn.Linear whose weight is read."""


class _EffectiveConv(EffectiveWeight):
    def multiplied(
        self: Any, call: Product, weight: _Adapted, compute: torch.dtype, output: torch.dtype, low: torch.dtype
    ) -> torch.Tensor | None:
        """Return a convolution with the effective weight, of the caller's geometry."""
        dims = len(weight.shape) - 2
        settings = None if call.geometry is None else plain_geometry(call.geometry, dims)
        if settings is None or call.x.dim() != dims + 2:
            return None
        dropouts, groups = self._dropouts(weight.names), call.geometry[3]  # type: ignore[index]
        stride, padding, dilation = settings
        geometry = Geometry(stride, padding, dilation, groups)
        merged = weight.route.path == "merged" and not dropouts
        layer = Layer(weight.frozen, merged, geometry, geometry, groups, True, weight.scalings, output, dropouts)
        return lora_conv(call.x, layer, call.bias, weight.inputs, Dtypes(compute, low))


class Conv1d(_EffectiveConv, conv.Conv1d):
    """LoRA on an nn.Conv1d whose weight is read."""


class Conv2d(_EffectiveConv, conv.Conv2d):
    """LoRA on an nn.Conv2d whose weight is read."""
