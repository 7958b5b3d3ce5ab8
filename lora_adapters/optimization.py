"""The fast forwards for LoRA layers that PEFT made: `optimize`, what it reports, and how layers that come later get them.

Every way that adds LoRA layers to a model (get_peft_model, add_adapter, load_adapter, diffusers' load_lora_weights) ends
in `BaseTuner.inject_adapter`. That one method is wrapped, the first time `optimize` is called, and acts only for models
that were optimized. torch has a public hook on the registration of modules that would need no wrapping, but it would run
for every module that any model in the process registers, and would have to find out each time which model that is.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from .backends import foreign_tuner, unwrap
from .errors import NoTargetError, RequestError
from .layers.fused import FusedForward
from .layers.groups import join_siblings
from .layers.optimized import optimized_class, stock_class
from .layers.routes import Route, route
from .report.route_table import count_routes, render_routes
from .weights import guard_cpu_repacking


@dataclass(frozen=True)
class OptimizedLayer:
    """One adapter layer of a model.

    Attributes:
        name: dotted module name.
        kind: PEFT's name of its class: "Linear", "Linear4bit", "Conv2d", ...
        path: "merged", "split" or "beside", the fast ones (see `lora_adapters.layers.routes`); "parent": PEFT's forward
            runs for now, and the layer takes a fast path as soon as that is exact; "stock": the layer was left alone.
        reason: why this path.
    """

    name: str
    kind: str
    path: str
    reason: str


@dataclass(frozen=True, repr=False)
class OptimizeReport:
    """What `optimize` found and did. Printing it gives a table. It is as of that call: call again for a fresh one.

    Attributes:
        layers: every adapter layer of the model, in the model's order.
    """

    layers: tuple[OptimizedLayer, ...]
    _model: weakref.ref[nn.Module] = field(compare=False)

    @property
    def counts(self) -> Mapping[str, int]:
        """Return path -> number of layers."""
        return Counter(layer.path for layer in self.layers)

    def undo(self) -> None:
        """Give every layer of the model PEFT's own class back, also those that came later, and cover no more of them.

        It concerns the model, not this report: one undo is enough however often `optimize` was called, and a second
        does nothing. Layers that `lora_adapters.attach` made or took over stay as they are: they belong to its adapter.
        Copies of the model are models of their own. What was mended in 4-bit base layers stays mended.
        """
        model = self._model()
        if model is None:
            return
        for layer in {*model.modules(), *_optimized.pop(model, ())}:
            vars(layer).pop("siblings", None)  # a group may hold layers that leave it now
            stock = stock_class(type(layer))
            if stock is not None:
                layer.__class__ = stock
                vars(layer).pop("fused", None)
        join_siblings(model)

    def __str__(self) -> str:
        rows = [(layer.name, layer.kind, Route(layer.path, layer.reason)) for layer in self.layers]
        return f"{len(self.layers)} adapter layers: {count_routes(self.counts)}\n{render_routes(rows)}"

    def __repr__(self) -> str:
        return f"<OptimizeReport: {len(self.layers)} adapter layers: {count_routes(self.counts)}>"


def optimize(model: nn.Module) -> OptimizeReport:
    """Make the LoRA layers of a model compute faster, in place; nothing else about it changes.

    Each layer of PEFT's own classes gets a class that differs in `forward` alone, which returns what PEFT's returns, and
    falls back to PEFT's wherever it can't be exactly that. Merging, saving, loading, names of classes and keys stay.
    Adapters that are added, loaded or swapped later are covered too, as long as this model object lives.

    A base in 4 bits by bitsandbytes also gets a mend of its CPU kernels, which compute wrong values in some cases, see
    `lora_adapters.weights.guard_cpu_repacking`. That is for the right results, and `undo` leaves it.

    Args:
        model: any module that holds LoRA layers of PEFT, however it got them: a PeftModel, the base inside one, a
            diffusers UNet or transformer, a text encoder, a torch.compile wrapper of one of them.

    Returns:
        What every adapter layer does now, and why. `report.undo()` goes back.

    Raises:
        RequestError: `model` is no module, or (NoTargetError) holds no LoRA layer. UnsupportedError: a 4-bit layer that
            bitsandbytes has repacked can't be restored. Nothing has been changed.
    """
    if not isinstance(model, nn.Module):
        raise RequestError(_no_module(model))
    base = unwrap(model)
    layers = [layer for layer in base.modules() if isinstance(layer, BaseTunerLayer)]
    if not any(isinstance(layer, LoraLayer) for layer in layers):
        raise NoTargetError(_no_lora(base, layers))
    guard_cpu_repacking(base)
    _wrap_injection()
    _optimized.setdefault(base, weakref.WeakSet())
    _cover(base, base)
    found = (OptimizedLayer(name, type(layer).__name__, *_path(layer, inside)) for name, layer, inside in _layers(base))
    return OptimizeReport(tuple(found), weakref.ref(base))


def _no_module(given: Any) -> str:
    parts = getattr(given, "components", None)
    parts = parts.items() if isinstance(parts, dict) else ()
    found = [
        n for n, part in parts if isinstance(part, nn.Module) and any(isinstance(m, LoraLayer) for m in part.modules())
    ]
    hint = f" Its parts with LoRA layers: optimize {' and '.join(f'.{name}' for name in found)}." if found else ""
    return f"optimize takes a module that holds LoRA layers, got a {type(given).__name__}.{hint}"


def _no_lora(model: nn.Module, others: list[Any]) -> str:
    methods = sorted({foreign_tuner(type(layer)) for layer in others} - {""})
    if methods:
        return (
            f"The model carries {', '.join(methods)} adapters: only LoRA has faster forwards. There is nothing to do."
        )
    return (
        f"This {type(model).__name__} holds no LoRA layer. Load or add an adapter first (get_peft_model, load_adapter, "
        "pipe.load_lora_weights), or let lora_adapters.attach add one, which needs no optimize."
    )


# ---- one model's layers ---------------------------------------------------------------------------------------------

#: Every optimized model, and the layers in it that got another class: also those that have left it since.
_optimized: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()


def _layers(model: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """Return the name and the adapter layers of a model, and whether an attention of PEFT's runs without calling it."""
    attention = ""
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        inside = bool(attention) and name.startswith(attention)
        if isinstance(module, MultiheadAttention):
            attention = f"{name}." if name else ""
        yield name, module, inside


def _path(layer: Any, inside_attention: bool) -> tuple[str, str]:
    """Return the way a layer takes, and why."""
    if reason := _why_left(layer, inside_attention):
        return "stock", reason
    found = route(layer)
    return found.path, found.reason


def _why_left(layer: Any, inside_attention: bool) -> str:
    """Return why a layer keeps its class, "" if it is, or can be, one with a fast forward."""
    if inside_attention:
        return "PEFT's MultiheadAttention merges it and never calls it"
    if isinstance(layer, FusedForward):
        return ""
    if "forward" in vars(layer):
        return "a forward was put on the layer, and runs instead of its class's"
    if optimized_class(type(layer)) is not None:
        return ""
    if method := foreign_tuner(type(layer)):
        return f"a layer of PEFT's {method}: only LoRA has faster forwards"
    if type(layer).__module__.startswith("peft."):
        return f"there is no faster forward for PEFT's {type(layer).__name__}"
    return f"{type(layer).__module__}.{type(layer).__name__} is not PEFT's own class"


def _cover(root: nn.Module, part: nn.Module) -> None:
    """Give a fast forward to the layers of `part` that belong to the optimized model `root`."""
    own = None if part is root else {id(module) for module in root.modules()}
    changed = False
    for _, layer, inside in _layers(part):
        ours = optimized_class(type(layer))
        if ours is None or _why_left(layer, inside) or (own is not None and id(layer) not in own):
            continue
        layer.__class__ = ours
        _optimized[root].add(layer)
        changed = True
    if changed:
        join_siblings(part)


# ---- layers that come later -----------------------------------------------------------------------------------------


def _wrap_injection() -> None:
    stock = BaseTuner.inject_adapter
    if getattr(stock, "_covers_optimized", False):
        return

    @functools.wraps(stock)
    def inject_adapter(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, model, *args, **kwargs)
        for root in list(_optimized):
            _cover(root, model)
        return result

    inject_adapter._covers_optimized = True  # type: ignore[attr-defined]
    BaseTuner.inject_adapter = inject_adapter
