"""The bypass probe: what a forward pass does with each layer, found by running one without data.

A copy of the model that has shapes but no values runs once in eval mode. Every torch function that is handed a layer's
weight while that layer is not being called is a direct read (`F.linear(x, self.qkv.weight, ...)`), and a layer that is
neither called nor read does nothing. The model itself is only looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lora_adapters.direct_reads import owners_of, why_not_called
from lora_adapters.targets import ModelInfo

from .inputs import image_shape
from .simulated import forward

_UNCALLED = "the model's forward never uses it"


@dataclass(frozen=True)
class Uses:
    """What the forward pass does with layers beyond calling them.

    Attributes:
        reads: layer -> who reads its weight without calling it, as "Class.method reads its weight".
        uncalled: layer -> why an adapter on it would do nothing.
        notes: why the forward could not be run, if it could not.
    """

    reads: Mapping[str, str] = field(default_factory=dict)
    uncalled: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def uses_of(info: ModelInfo) -> Uses:
    """Return what the model's forward does with its layers. Works on any device, "meta" included; changes nothing.

    A model whose forward can't be run without data is read instead: its classes' source, see
    `lora_adapters.direct_reads`.
    """
    try:
        return _run(info)
    except Exception as error:  # whatever a forward may raise on shapes alone
        reads = _from_source(info)
        note = f"{info.family}'s forward can't be run without data ({type(error).__name__}): weights that it reads " + (
            "without a call were looked for in its source."
        )
        return Uses(reads=reads, notes=(note,))


def _run(info: ModelInfo) -> Uses:
    seen: list[_Watch] = []

    def watching(copy: nn.Module) -> _Watch:
        seen.append(_Watch(copy, info.modules))
        return seen[-1]

    forward(info.model, image_shape(info.model), watching)
    watch = seen[0]
    return Uses(
        reads={name: watch.reads[name] for name in info.modules if name in watch.reads},
        uncalled={name: _UNCALLED for name in info.modules if name not in watch.called and name not in watch.reads},
    )


class _Watch(TorchFunctionMode):
    """Sees which layers a forward calls, and which weights it uses outside their layers' calls."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.reads: dict[str, str] = {}
        self._active: list[str] = []  # layers being called now, outermost first
        self._names: dict[int, list[str]] = {}  # id of a weight -> layers that hold it
        modules = dict(model.named_modules())
        for name in layers:
            layer = modules[name]
            weight = getattr(layer, "get_base_layer", lambda layer=layer: layer)()._parameters["weight"]
            self._names.setdefault(id(weight), []).append(name)
            layer.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            layer.register_forward_hook(lambda *_: self._active.pop() and None)

    def _enter(self, name: str) -> None:
        self.called.add(name)
        self._active.append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; note whose weight it was given from outside, if it made a tensor of it."""
        out = func(*args, **(kwargs or {}))
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(out)):
            return out  # a look at its dtype, its shape
        for leaf in tree_leaves((args, kwargs)):
            names = self._names.get(id(leaf), ()) if isinstance(leaf, torch.Tensor) else ()
            if not any(name in self._active for name in names):
                for name in names:
                    self.reads.setdefault(name, f"{_reader()} reads its weight")
        return out


def _reader() -> str:
    """Return "Class.method" of the innermost module's method that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not type(owner).__module__.startswith("torch."):
            return f"{type(owner).__name__}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "the model"


def _from_source(info: ModelInfo) -> dict[str, str]:
    modules = dict(info.model.named_modules(remove_duplicate=False))
    found = {}
    for name, module in info.modules.items():
        base = getattr(module, "get_base_layer", lambda module=module: module)()
        if reason := why_not_called(base, owners_of(name, modules)):
            found[name] = reason.partition(" without calling it")[0]
    return found
