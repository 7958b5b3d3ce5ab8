"""A weight that is not there yet: products with it are computed by who made it, anything else makes its values.

The code of a model, or a layer class's own forward, multiplies by a weight in its own words: `F.linear(x, W, bias)`. Given
such a tensor for W it does so without the values of W in memory for backward, whatever they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only


class Product(NamedTuple):
    """One product with a deferred weight.

    Attributes:
        x: the input.
        bias: as the caller gave it.
        geometry: stride, padding, dilation, groups of a convolution; None for F.linear.
    """

    x: torch.Tensor
    bias: torch.Tensor | None
    geometry: tuple[Any, Any, Any, int] | None


class Source(Protocol):
    """What stands behind a deferred weight.

    Attributes:
        shape, dtype, device: of the weight.
        inputs: the tensors it is made of that may want gradients.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    inputs: Sequence[torch.Tensor]

    def product(self, call: Product) -> torch.Tensor | None:
        """Return the product's result, None where only the values will do."""
        ...

    def values(self) -> torch.Tensor:
        """Return the dense weight. Autograd does not look on."""
        ...

    def gradients(self, gradient: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """Return the gradients of `inputs` for that of the dense weight."""
        ...


def deferred(source: Source) -> torch.Tensor:
    """Return the weight that `source` stands for. Shape, dtype, device and requires_grad are those of the real one."""
    weight = _Made.apply(source, *source.inputs)
    assert isinstance(weight, torch.Tensor)
    return weight


class _Made(torch.autograd.Function):
    """The way of a gradient that reached the weight by another way than a product."""

    @staticmethod
    def forward(ctx: Any, source: Source, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.source = source
        return DeferredWeight(source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return None, *ctx.source.gradients(gradient)


class DeferredWeight(torch.Tensor):
    """See `deferred`. It has no memory of its own; the result of any operation on it is an ordinary tensor."""

    source: Source

    @staticmethod
    def __new__(cls, source: Source) -> DeferredWeight:
        """Return a tensor without values."""
        make: Any = torch.Tensor._make_wrapper_subclass
        weight = make(cls, source.shape, dtype=source.dtype, device=source.device)
        weight.source = source
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand products to the source; what it declines, and everything else, is computed by torch."""
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            weight, call = _PRODUCTS[func](*args, **kwargs)
            if type(weight) is cls and type(call.x) is not cls:
                result = weight.source.product(call)
                if result is not None:
                    return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute with the values: below autograd, which takes this tensor for the weight and records what it needs."""
        args, kwargs = tree_map_only(DeferredWeight, _values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeferredWeight(shape={tuple(self.shape)}, dtype={self.dtype})"


def _values(weight: DeferredWeight) -> torch.Tensor:
    return weight.source.values()


def _linear(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Product]:
    return weight, Product(input, bias, None)


def _conv(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Any, Product]:
    return weight, Product(input, bias, (stride, padding, dilation, groups))


#: The functions that are products, with the names that torch gives their arguments.
_PRODUCTS: dict[Any, Callable[..., tuple[Any, Product]]] = {F.linear: _linear, F.conv1d: _conv, F.conv2d: _conv}


def plain_geometry(geometry: tuple[Any, Any, Any, int], dims: int) -> tuple[tuple[int, ...], ...] | None:
    """Return stride, padding and dilation with one number a dimension; None where the padding is a word."""
    if isinstance(geometry[1], str):
        return None
    return tuple(_each(value, dims) for value in geometry[:3])


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values
