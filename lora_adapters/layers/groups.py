"""Sibling layers that read one input (q, k and v; gate and up) computed as one: x is read once, and dX summed in place.

The model goes on calling its layers one by one. Which of them are given one variable is read off the source of the module
that holds them; no source, no group. The first of such a run computes for all, and each of the others takes its result if
it is called with that very tensor, unwritten, and with nothing about itself changed; else it computes alone. So a sibling
that is called alone or with another tensor is right in any case; at most work is wasted, and results are held until the
first one is called again. As nothing is decided while
a model runs, a repeated forward (gradient checkpointing) and a resumed training do what the first one did, bit for bit.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import threading
import weakref
from typing import Any

import torch
from torch import nn

from ..ops.choice import linear_layers

_CALL = re.compile(r"\bself\.(\w+)\(\s*(\w+)\s*\)")


class _Slot:
    """What one thread knows of one group between two calls."""

    def __init__(self) -> None:
        self.x: torch.Tensor | None = None
        self.version = -1
        self.ready: dict[int, tuple[torch.Tensor, Any]] = {}


class _Slots(threading.local):
    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[SiblingGroup, _Slot] = weakref.WeakKeyDictionary()


_slots = _Slots()


class SiblingGroup:
    """Layers of one parent that are given one variable, in the order in which they are called.

    Attributes:
        layers: the siblings; the first one computes for all.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def call(self, layer: Any, x: torch.Tensor, names: list[str]) -> torch.Tensor | None:
        """Return the layer's output for x, computed with its siblings or taken from them; None as `prepare` does."""
        mine = next((i for i, sibling in enumerate(self.layers) if sibling is layer), None)
        if mine is None or x.is_inference():  # a replica of the layer on another device; a tensor without versions
            return layer.alone(x, names)
        slot = _slots.of.get(self)
        if slot is None:
            slot = _slots.of[self] = _Slot()
        if mine in slot.ready:
            y, key = slot.ready.pop(mine)
            same = slot.x is x and slot.version == x._version and key == _key(layer, names, x)
            if not slot.ready:
                slot.x = None
            if same:
                return y
        return self._together(slot, x, names) if mine == 0 else layer.alone(x, names)

    def _together(self, slot: _Slot, x: torch.Tensor, names: list[str]) -> torch.Tensor | None:
        first = self.layers[0].prepare(x, names)
        if first is None or first.member.dropouts:
            return self.layers[0].alone(x, names)
        prepared = [first]
        waiting = []
        for index, layer in enumerate(self.layers[1:], 1):
            own = layer.ready_names(x)
            part = layer.prepare(x, own) if own else None
            if part is not None and part.dtypes == first.dtypes and not part.member.dropouts:
                prepared.append(part)
                waiting.append((index, _key(layer, own, x)))
        outputs = linear_layers(
            x,
            [part.member for part in prepared],
            [part.addend for part in prepared],
            [factor for part in prepared for factor in part.factors],
            first.dtypes,
        )
        slot.ready = {index: (y, key) for (index, key), y in zip(waiting, outputs[1:], strict=True)}
        slot.x, slot.version = (x, x._version) if waiting else (None, -1)
        return outputs[0]


def _key(layer: Any, names: list[str], x: torch.Tensor) -> Any:
    """Return what a layer's result depends on besides x: whoever changes it in between gets a result of its own."""
    # The parameters themselves: a masked factor is a new tensor each time.
    tensors = [part._parameters["weight"] for name in names for part in layer.parts(name)[:2]]
    tensors += [layer._modules["base_layer"]._parameters["weight"]]
    state = (layer.training, torch.is_autocast_enabled(x.device.type), torch.is_grad_enabled())
    return state, tuple(names), layer.scalings(names), [(id(t), t._version) for t in tensors]


def join_siblings(model: nn.Module) -> None:
    """Make a group of the linear LoRA layers that a module of `model` gives one variable, for each such variable."""
    from .fused import FusedLinear

    for parent in model.modules():
        held = {name: child for name, child in parent._modules.items() if isinstance(child, FusedLinear)}
        if len(held) < 2:
            continue
        for layer in held.values():
            layer.__dict__.pop("siblings", None)
        for run in given_one_variable(type(parent)):
            if len(layers := [held[name] for name in run if name in held]) > 1:
                group = SiblingGroup(layers)
                for layer in layers:
                    layer.__dict__["siblings"] = group


_RUNS: dict[type[nn.Module], tuple[tuple[str, ...], ...]] = {}


def given_one_variable(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Return the names of children that the class's forward calls with one and the same variable, in calling order.

    A child that is called in two places or with two variables is in none; an assignment to the variable ends a run.
    """
    if cls not in _RUNS:
        _RUNS[cls] = _read_runs(cls)
    return _RUNS[cls]


def _read_runs(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    try:
        source = textwrap.dedent(inspect.getsource(cls.forward))
    except (OSError, TypeError):
        return ()
    calls = [(match[1], match[2], match.start()) for match in _CALL.finditer(source)]
    names = [child for child, _, _ in calls]
    # A child named in another way too (an argument besides, a keyword) is called in two places.
    once = {name for name in names if len(re.findall(rf"\bself\.{name}\b", source)) == 1}
    runs: dict[str, list[list[str]]] = {}
    last: dict[str, int] = {}
    for child, variable, place in calls:
        if child not in once:
            continue
        between = source[last.get(variable, place) : place]
        mine = runs.setdefault(variable, [])
        if not mine or re.search(rf"^\s*{variable}\s*(,[^=]*)?[-+*/@]?=[^=]", between, re.MULTILINE):
            mine.append([])
        mine[-1].append(child)
        last[variable] = place
    return tuple(tuple(run) for each in runs.values() for run in each if len(run) > 1)
