"""The store of ordinary dense layers, and what is known about a plain layer without any quantizer."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType

import torch
from torch import nn

from ..errors import RequestError

#: Dtypes a dense weight may have. float8 is missing on purpose: such a weight has a scale beside it that we don't know.
DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_transposed(module: nn.Module) -> bool:
    """True for transformers' `pytorch_utils.Conv1D` (GPT-2): a linear layer whose weight has shape (in, out)."""
    if not any(cls.__name__ == "Conv1D" for cls in type(module).__mro__):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and getattr(module, "nf", None) == weight.shape[1]


def layer_kind(module: nn.Module) -> str | None:
    """Return "linear", "conv1d", "conv2d" or "embedding" by the module's class, None for every other class."""
    for cls, kind in ((nn.Linear, "linear"), (nn.Conv1d, "conv1d"), (nn.Conv2d, "conv2d"), (nn.Embedding, "embedding")):
        if isinstance(module, cls):
            return kind
    return "linear" if is_transposed(module) else None


def check_shape(weight: torch.Tensor, shape: torch.Size) -> None:
    """Raise RequestError if a weight handed to a store has another shape than the store."""
    if weight.shape != shape:
        raise RequestError(f"The layer's weight has shape {tuple(shape)}; got one of shape {tuple(weight.shape)}.")


def carry_settings(old: nn.Module, new: nn.Module) -> None:
    """Give a replacement module the old one's training flag and forward and backward hooks (in dicts of its own)."""
    new.training = old.training
    for name, value in vars(old).items():
        if name.startswith(("_forward_", "_backward_")) and isinstance(value, dict):
            vars(new)[name] = copy.copy(value)
    vars(new)["_is_full_backward_hook"] = vars(old).get("_is_full_backward_hook")


def copy_bias(old: nn.Module, new: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give `new` its own copy of the old module's bias, trainable if the old one was.

    A copy, because bitsandbytes casts the bias of its layers in place and the old module must stay as it is.
    """
    bias = old._parameters.get("bias")
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(dtype or bias.dtype, copy=True), requires_grad=bias.requires_grad)


class DenseStore:
    """The store of nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding and their subclasses, and of transformers' Conv1D."""

    def __init__(self, module: nn.Module) -> None:
        self.format = "dense"
        self.module = module
        self._transposed = is_transposed(module)

    @property
    def logical(self) -> torch.Tensor:
        """The stored weight in logical orientation: a view of what is stored."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight.detach().t() if self._transposed else weight.detach()

    @property
    def shape(self) -> torch.Size:
        """Logical shape: (out, in) for linear, also where the layer keeps it transposed."""
        return self.logical.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight."""
        return self.logical.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.logical.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.logical.numel() * self.logical.element_size()

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a copy of the weight, in logical orientation."""
        values = self.logical.to(dtype or self.dtype, copy=True)
        return values.contiguous() if self._transposed else values

    def write(self, weight: torch.Tensor) -> None:
        """Overwrite the weight in place; it keeps its dtype, device and identity.

        Raises:
            RequestError: the shape differs.
        """
        check_shape(weight, self.shape)
        self.logical.copy_(weight.detach())

    def dense_module(self, weight: torch.Tensor) -> nn.Module:
        """Return a shallow copy of the module that holds `weight`, frozen; everything else is the old module's.

        Raises:
            RequestError: the shape differs.
        """
        check_shape(weight, self.shape)
        new = copy.copy(self.module)
        for name, value in list(vars(new).items()):
            # nn.Module keeps parameters, buffers, children and hooks in dicts that copy.copy would share.
            if name.startswith("_") and isinstance(value, dict):
                vars(new)[name] = copy.copy(value)
        _rebind(self.module, new)
        values = weight.detach()
        new._parameters["weight"] = nn.Parameter(values.t().contiguous() if self._transposed else values, False)
        return new


def _rebind(old: nn.Module, new: nn.Module) -> None:
    """Bind to a copy what is bound to the old module: a forward that hooks put on it would compute with the old weight."""
    for name, value in list(vars(new).items()):
        if isinstance(value, MethodType) and value.__self__ is old:
            vars(new)[name] = MethodType(value.__func__, new)
        elif isinstance(value, partial) and value.args and value.args[0] is old:
            vars(new)[name] = partial(value.func, new, *value.args[1:], **value.keywords)


def forward_of_another(module: nn.Module) -> bool:
    """Return True if a forward was put on a module, and a copy's would go on computing with this one's weight.

    Hooks of accelerate find what they wrap through the module that they are given, and methods are bound: `_rebind`
    serves both. What a closure holds (diffusers' hooks, a user's own function) can't be told.
    """
    forward = vars(module).get("forward")
    bound = isinstance(forward, MethodType) and forward.__self__ is module
    return forward is not None and not bound and "_old_forward" not in vars(module)


def dense_store(module: nn.Module) -> DenseStore | None:
    """Return the store of a dense layer, or None if its class is unknown or its weight is not a plain dense parameter.

    Tensor subclasses (sharded, quantized by another package), computed weights (parametrizations, weight norm), lazy
    layers and float8 weights are not plain.
    """
    weight = module._parameters.get("weight")
    if layer_kind(module) is None or type(weight) is not nn.Parameter or weight.dtype not in DENSE_DTYPES:
        return None
    return DenseStore(module)


_PLAIN = {"linear": (nn.Linear, ("forward",)), "conv1d": (nn.Conv1d, ("forward", "_conv_forward"))}
_PLAIN["conv2d"] = (nn.Conv2d, ("forward", "_conv_forward"))


def why_not_plain(module: nn.Module, kinds: tuple[str, ...], own_forward: bool = False) -> str:
    """Return "" if a module of another class may take this module's place, else the reason why not.

    Meant for `Quantizer.supports`. Replacing is safe only if the layer does nothing but its framework's own operation
    on a dense weight: what a subclass or an instance adds to `forward` would be lost. `own_forward=True` is for a
    quantizer whose module runs the class's own forward.
    """
    kind, name = layer_kind(module), type(module).__name__
    if kind is None or kind not in kinds:
        return f"{name} is none of the kinds that can be quantized ({', '.join(kinds)})"
    if dense_store(module) is None:
        return f"the weight of this {name} is not a plain dense parameter (quantized, sharded, lazy or computed)"
    if "forward" in vars(module):
        return "the layer's forward was replaced on the instance (an offload or compile hook)"
    if type(module).__call__ is not nn.Module.__call__:
        return f"{name} does something of its own when it is called, around its forward"
    if any(tensor in vars(cls) for cls in type(module).__mro__ for tensor in ("weight", "bias")):
        return f"the class {name} computes its weight or bias"
    if name == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention uses this layer's weight without calling the layer"
    if is_transposed(module):
        return "" if name == "Conv1D" else f"{name} may have a forward of its own"
    return "" if own_forward or not has_own_forward(module) else f"{name} has a forward of its own"


def has_own_forward(module: nn.Module) -> bool:
    """Return True if the class of an nn.Linear, nn.Conv1d or nn.Conv2d computes in another way than torch's class."""
    base, methods = _PLAIN[layer_kind(module) or ""]
    return any(getattr(type(module), method, None) is not getattr(base, method, None) for method in methods)
