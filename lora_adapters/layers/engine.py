"""What all adapter layers share: building without PEFT's injection, and one merge for every store."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..errors import MergeError
from ..weights import store_for
from ..weights.dense import forward_of_another, is_transposed


@dataclass(frozen=True)
class Factors:
    """One adapter's part in one layer.

    Attributes:
        a: lora_A as PEFT shapes it: (rank, in) linear, (rank, in / groups, *kernel) conv, (rank, rows) embedding.
        b: lora_B: (out, rank) linear, (out, rank, 1...) conv, (dim, rank) embedding.
        rank, alpha, scaling: as in the plan.
        dropout: probability.
        rslora: True if scaling is alpha / sqrt(rank).
        bias: lora_B's bias (out,), or None.
        mask: bool (out, rank), where `b` may differ from zero (see `part_factors`), or None for everywhere.
    """

    a: torch.Tensor
    b: torch.Tensor
    rank: int
    alpha: float
    scaling: float
    dropout: float = 0.0
    rslora: bool = False
    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None


# nn.Module comes first, as in PEFT's own classes: a stock layer can then be turned into ours by setting its __class__,
# because Python finds the same memory layout in both.
class EngineLayer(nn.Module, LoraLayer):
    """Mixin placed before a PEFT LoRA layer class.

    Forward is the parent's: y = base(x) + scaling * B(A(dropout(x))) for every active adapter. Merging swaps the base
    module for a dense one that holds dequant(W) + scaling * B @ A and keeps the old module aside, so that unmerging
    gives back the very same module, bit for bit, whatever the store.
    """

    #: The base module set aside while merged, in a tuple so that nn.Module does not register it.
    _aside: tuple[nn.Module, ...] = ()

    if TYPE_CHECKING:
        # What a layer class brings: where its factors live, and scaling * B @ A in the base weight's own layout.
        factor_names: tuple[str, str]

        def _set_factors(self, name: str, factors: Factors) -> None: ...
        def get_delta_weight(self, adapter: str) -> torch.Tensor: ...  # noqa: D102

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base module that this layer lacks: models ask a layer for its kernel_size."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not yet there while a copy is being made; a name of PEFT's must not be found on another layer of its.
            base = vars(self).get("_modules", {}).get("base_layer")
            if base is None or name in _OWN or name.startswith(("lora_", "__")):
                raise
            return getattr(base, name)

    @classmethod
    def wrap(cls, base: nn.Module) -> EngineLayer:
        """Return a layer around `base` with no adapter yet."""
        layer = fresh(_bare_layer(cls))
        layer._modules = {
            n: base if n == "base_layer" else fresh(m) for n, m in layer._modules.items() if m is not None
        }
        layer.in_features, layer.out_features = layer._get_in_out_features(base)
        layer._prepare(base)
        return layer

    def _prepare(self, base: nn.Module) -> None:
        """Set the attributes that the parent's __init__ would set."""

    def add_factors(self, name: str, factors: Factors) -> None:
        """Add one adapter. The tensors become parameters as they are: same device, same dtype, trainable."""
        self._active_adapter = self._active_adapter or [name]
        self.r[name] = factors.rank
        self.lora_alpha[name] = factors.alpha
        self.scaling[name] = factors.scaling
        self.use_rslora[name] = factors.rslora
        self.use_dora[name] = False
        self.lora_bias[name] = factors.bias is not None
        self.lora_dropout._modules[name] = nn.Dropout(factors.dropout) if factors.dropout else fresh(_IDENTITY)
        self._set_factors(name, factors)

    def factor_parameters(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the parameters A and B of one adapter: what is trained, of which a mask may leave only a part."""
        factors = [getattr(self, attribute)[name] for attribute in self.factor_names]
        a, b = (f if isinstance(f, nn.Parameter) else f._parameters["weight"] for f in factors)
        return a, b

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base. The result is always checked to be finite, so `safe_merge` changes nothing.

        Args:
            safe_merge: kept for PEFT's signature.
            adapter_names: which adapters; None means the active ones.

        Raises:
            MergeError: the merged weight is not finite, or a bias has nowhere to go. The layer is unchanged.
        """
        wanted = adapter_names or list(self.active_adapters)
        names = [n for n in wanted if n in getattr(self, self.factor_names[0]) and n not in self.merged_adapters]
        if not names:
            return
        original = self._aside[0] if self._aside else self.base_layer
        merged = self._merged_base(original, [*self.merged_adapters, *names])
        self._aside = (original,)
        self.base_layer = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original base module back."""
        if not self._aside:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        device = next(self.base_layer.parameters()).device
        self.base_layer = self._aside[0].to(device)
        self._aside = ()
        self.merged_adapters.clear()

    def let_go(self) -> None:
        """Free the original base module, once merged for good. There is no `unmerge` after this."""
        self._aside = ()

    def _merged_base(self, original: nn.Module, names: list[str]) -> nn.Module:
        store = store_for(original)
        if store is None:
            raise MergeError(f"Can't merge into a {type(original).__name__}: its weight can't be read.")
        if forward_of_another(original):
            raise MergeError(
                f"Can't merge into a {type(original).__name__} whose forward other code has replaced (hooks of diffusers' "
                "offloading, say): it would go on computing with the old weight. Take the hooks off first, as "
                "LoraPipeline.fuse does."
            )
        with torch.no_grad():
            # The sum is taken in float32 at least: a 16-bit sum would round small updates away before the last step.
            wide = torch.promote_types(store.dtype, torch.float32)
            weight = store.read(wide)
            # A module of the store's own dtype: its bias takes part in 16-bit products as it is.
            merged: Any = store.dense_module(weight.to(store.dtype))
            if is_transposed(original):  # as its own weight, and the delta, lie
                weight = weight.t().contiguous()
            own_bias: Any = getattr(merged, "bias", None)
            bias = None if own_bias is None else own_bias.data
            for name in names:
                if name in self.lora_variant:
                    variant: Any = self.lora_variant[name]
                    weight = variant.merge_safe(self, name, weight)
                else:
                    weight = weight + self.get_delta_weight(name).to(wide)
                bias = self._merged_bias(name, bias)
            weight = weight.to(store.dtype)
            if not torch.isfinite(weight).all() or (bias is not None and not torch.isfinite(bias).all()):
                raise MergeError(f"Merging {names} gives values that are not finite. Nothing was merged here.")
            merged.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None and own_bias is not None and bias is not own_bias.data:
                merged.bias = nn.Parameter(bias.to(own_bias.dtype), requires_grad=False)
        return merged

    def _merged_bias(self, name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        if not self.lora_bias.get(name):
            return bias
        if bias is None:
            raise MergeError(f"Adapter {name!r} has a bias (lora_bias=True), and the base layer has none to take it.")
        return bias + self.lora_B[name].bias * self.scaling[name]  # type: ignore[operator,union-attr]


#: Names never looked up in the base: accelerate and diffusers would take the base's hooks for the layer's, and take them
#: off twice.
_OWN = ("base_layer", "_hf_hook", "_old_forward", "_diffusers_hook")

# A 70B model takes 560 layers of ten modules each, and constructing a module takes longer than everything else that
# attaching does. So each kind is constructed once, and the others are copies of that one with containers of their own.

_Module = TypeVar("_Module", bound=nn.Module)
_CONTAINERS = (dict, OrderedDict, list, set)
_IDENTITY = nn.Identity()
_LINEAR = nn.Linear(1, 1, bias=False, device="meta")


def fresh(module: _Module) -> _Module:
    """Return a module like this one, with empty or copied containers of its own. Children and tensors are shared."""
    twin = module.__class__.__new__(module.__class__)
    state = vars(module)
    vars(twin).update({k: v.copy() if type(v) in _CONTAINERS else v for k, v in state.items()})
    return twin


@cache
def _bare_layer(cls: type[EngineLayer]) -> EngineLayer:
    """Return a layer of this class as LoraLayer.__init__ leaves it; `wrap` makes copies of it."""
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    LoraLayer.__init__(layer, _LINEAR)
    layer._active_adapter = []
    return layer


def bare_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """Return an nn.Linear around a tensor, without the time and random numbers that its own initialisation takes."""
    layer = fresh(_LINEAR)
    layer.out_features, layer.in_features = weight.shape
    layer._parameters = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    return layer
