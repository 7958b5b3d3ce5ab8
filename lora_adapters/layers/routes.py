"""Which way a LoRA layer computes, decided by one rule that can be read off the layer at any time.

- "merged": the base weight is stored in 4 bits, or by a plugin's quantizer, so it is unpacked for the product anyway:
  the update goes into it on the way, and one product does everything. With dropout such a call is "split".
- "split": a dense weight. One product is added to the other inside the matrix product.
- "beside": the base module runs as it is (its weight trains, it has hooks, its class has a forward of its own, INT8),
  and the low-rank product is added to its result.
- "substituted": the base class's own forward runs on the effective weight (layers that `effective` makes).
- "parent": PEFT's own forward, wherever a layer is not exactly that sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as _module

from ..weights import primitives, store_for
from ..weights.conv4bit import Conv4bit
from ..weights.dense import DENSE_DTYPES, DenseStore


@dataclass(frozen=True)
class Route:
    """The way a layer takes, why, and how its weight is read: "dense", "4bit", "store", or "" if it is not."""

    path: str
    reason: str
    reads: str = ""


_MERGED = Route("merged", "the weight is unpacked for the product anyway", "4bit")
_STORED = Route("merged", "the weight is read through its quantizer's store", "store")
_SPLIT = Route("split", "a dense weight", "dense")
_TRAINED = Route("beside", "the base weight is trained")
_HOOKED = Route("beside", "the base layer has hooks or a forward put on it")
_OWN_FORWARD = Route("beside", "the base layer's class has a forward of its own")
_NOT_PLAIN = Route("beside", "the base weight is not a plain tensor")
_SUBSTITUTED = Route("substituted", "the base layer's class has a forward of its own: it runs on the effective weight")
_GATHERED = Route("beside", "rows are gathered, not multiplied")

#: Tensor classes that are nothing but values in memory (or the simulation of that).
PLAIN_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor)


def active(layer: Any) -> list[str]:
    """Return the names of the active adapters that a layer carries, in the order PEFT applies them."""
    chosen = layer._active_adapter
    held = layer._modules[layer.factor_names[0]]
    return [name for name in ((chosen,) if isinstance(chosen, str) else chosen) if name in held]


def route(layer: Any) -> Route:
    """Return the way a fused layer takes now. It follows the layer's state: hooks, adapters, flags."""
    if not layer.fused and not getattr(layer, "effective", False):
        return Route("parent", "fused=False")
    if layer.merged_adapters:
        return Route("parent", "merged: the base layer runs alone")
    if layer._disable_adapters:
        return Route("parent", "its adapters are disabled: the base layer runs alone")
    if not (names := active(layer)):
        return Route("parent", "no active adapter: the base layer runs alone")
    if getattr(layer, "effective", False) and runs_own_forward(layer._modules["base_layer"]):
        return _SUBSTITUTED
    reason = why_parent(layer, names) if layer.fused else "fused=False"
    return Route("parent", reason) if reason else base_route(layer._modules["base_layer"])


def why_parent(layer: Any, names: list[str]) -> str:
    """Return why only PEFT's forward is exact for these adapters, "" if they are plain LoRA."""
    if (
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    ):
        return "a hook is registered on all modules"
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return "casting of inputs is switched off"
    dtype = None
    for name in names:
        if name in layer.lora_variant:
            return f"PEFT's {type(layer.lora_variant[name]).__name__}"
        if type(layer.scaling[name]) not in (float, int):
            return f"the scaling is a {type(layer.scaling[name]).__name__}, not a number"
        a, b, *dropouts = layer.parts(name)
        for part in dropouts:
            if is_observed(part):
                return f"the adapter's {type(part).__name__} has hooks or a forward put on it"
            if type(part) is not nn.Identity and (type(part) is not nn.Dropout or part.inplace):
                return f"the adapter's dropout is a {part}"
        for part in (a, b):
            if isinstance(part, nn.Module):
                if is_observed(part):
                    return f"the adapter's {type(part).__name__} has hooks or a forward put on it"
                if layer.plain_parts.get(type(part)) is not type(part).forward:
                    return f"the adapter holds a {type(part).__name__}"
                bias = part._parameters.get("bias")
                if bias is not None and (part is a or type(bias) not in PLAIN_TENSORS):
                    return "lora_A has a bias" if part is a else f"lora_B's bias is a {type(bias).__name__}"
                part = part._parameters.get("weight")
            if part is None:
                return "an adapter weight is not among its module's parameters"
            if type(part) not in PLAIN_TENSORS:
                return f"an adapter weight is a {type(part).__name__}"
            if dtype not in (None, part.dtype):
                return "adapters of different dtypes"
            dtype = part.dtype
    return layer.why_not_exact(names)


def is_observed(module: nn.Module) -> bool:
    """Return True if something else happens when a module is called: hooks (FSDP, offload, the user's), a new forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def base_route(base: nn.Module) -> Route:
    """Return the way that a base module allows."""
    if is_observed(base):
        return _HOOKED
    kind = _kind(type(base))
    if kind == "rows":
        return _GATHERED
    if kind == "own":
        return _OWN_FORWARD
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias", _MISSING)
    if bias is not None and type(bias) not in PLAIN_TENSORS:
        return _NOT_PLAIN
    if kind == "dense":
        if weight is None or type(weight) not in PLAIN_TENSORS or weight.dtype not in DENSE_DTYPES:
            return _NOT_PLAIN
        return _TRAINED if weight.requires_grad else _SPLIT
    if kind == "4bit":
        plain = type(weight) in PLAIN_TENSORS or type(weight).__name__ == "Params4bit"
        return _MERGED if plain and _is_packed_plainly(base, weight) else _NOT_PLAIN
    store = store_for(base)
    return _OWN_FORWARD if store is None or isinstance(store, DenseStore) else _STORED


def runs_own_forward(base: nn.Module) -> bool:
    """Return True for a linear layer or convolution whose class does something else than torch's with a dense weight.

    Also for the 4-bit form of such a convolution; not for transformers' Conv1D, which stores its weight transposed.
    """
    if isinstance(base, Conv4bit):
        return _kind(type(base)) == "own"
    if type(base).__name__ == "NonDynamicallyQuantizableLinear" or not isinstance(
        base, (nn.Linear, nn.Conv1d, nn.Conv2d)
    ):
        return False
    return _kind(type(base)) in ("own", "") and _is_plainly_dense(base._parameters.get("weight"))


def _is_plainly_dense(weight: Any) -> bool:
    return weight is not None and type(weight) in PLAIN_TENSORS and weight.dtype in DENSE_DTYPES


def weight_route(base: nn.Module) -> Route:
    """Return the way that a base module's weight allows where others compute with it, whatever the module's forward."""
    weight = base._parameters.get("weight")
    if isinstance(base, Conv4bit):
        return _MERGED
    if any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes") for c in type(base).__mro__):
        return _MERGED if _is_packed_plainly(base, weight) else _STORED
    return _SPLIT if _is_plainly_dense(weight) else _STORED


def _is_packed_plainly(base: Any, weight: Any) -> bool:
    """Return True if a 4-bit weight is packed row by row, as `ops.frozen.Packed` reads it."""
    if isinstance(base, Conv4bit):
        return True
    state = getattr(weight, "quant_state", None)
    return (
        state is not None
        and tuple(state.shape) == (base.out_features, base.in_features)
        # bitsandbytes repacks a weight in eval mode on some CPUs.
        and not getattr(state, "packing_format_for_cpu", False)
        and (state.state2 is None or state.state2.blocksize == primitives.NESTED_BLOCKSIZE)
    )


_KINDS: dict[type[nn.Module], tuple[Any, str]] = {}


def _kind(cls: type[nn.Module]) -> str:
    """Return what a base class computes: "dense", "4bit" or "rows", "own" if it can't be told, "" if a store may say."""
    # A plain dict: torch.compile reads it, and would warn about a functools.cache.
    # With the forward that it was found for: a class may be patched later.
    found = _KINDS.get(cls)
    if found is None or found[0] is not cls.forward:
        found = _KINDS[cls] = (cls.forward, _find_kind(cls))
    return found[1]


def _find_kind(cls: type[nn.Module]) -> str:
    if cls.__name__ == "NonDynamicallyQuantizableLinear" or any(getattr(cls, m) is not f for m, f in _MODULE.items()):
        return "own"
    if issubclass(cls, nn.Embedding):
        return "rows"
    # A class attribute of this name would hide the parameter from forward.
    if any(name in vars(c) for c in cls.__mro__ for name in ("weight", "bias")):
        return "own"
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return "dense"
    if issubclass(cls, Conv4bit):
        return "4bit" if cls.forward is Conv4bit.forward else "own"
    if any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes") for c in cls.__mro__):
        from bitsandbytes.nn import Linear4bit

        from ..weights.linear4bit import Linear4bit as Mended

        return "4bit" if cls.forward in (Linear4bit.forward, Mended.forward) else "own"
    if any(c.__module__.startswith("bitsandbytes") for c in cls.__mro__):
        return "own"  # INT8 rounds its input too, on some devices
    for base, methods in _PLAIN.items():
        if issubclass(cls, base) and all(getattr(cls, m) is f for m, f in methods.items()):
            return "dense"
    return ""


#: What torch's classes do: a class, or a patch of torch, that does something else is noticed.
_PLAIN: dict[type[nn.Module], dict[str, Any]] = {
    nn.Linear: {"forward": nn.Linear.forward},
    nn.Conv1d: {"forward": nn.Conv1d.forward, "_conv_forward": nn.Conv1d._conv_forward},
    nn.Conv2d: {"forward": nn.Conv2d.forward, "_conv_forward": nn.Conv2d._conv_forward},
}
_MODULE: dict[str, Any] = {m: getattr(nn.Module, m) for m in ("__call__", "_call_impl", "__getattr__")}
_MISSING = object()
