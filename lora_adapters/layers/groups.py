"""Sibling layers that read one input (q, k and v; gate and up) computed as one: x is read once, and dX summed in place.

The model goes on calling its layers one by one. Which of them share an input is not asserted but seen: while a group
has not decided, its layers compute alone and it notes who is called with the very same tensor as the one before. From
then on the first of such a run computes for all, and each of the others takes its result if it is called with that same
tensor, unwritten, and with nothing about itself changed; else it computes alone. So a sibling that is called alone or
with another tensor (cross attention) is right in any case, and at most work is wasted.

How much autograd keeps differs between the two ways, and gradient checkpointing compares that between a forward and its
repetition. So a group decides only while no graph of an undecided forward waits for its backward.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

import torch
from torch import nn

from ..ops.choice import linear_layers


class _Slot:
    """What one thread knows of one group between two calls."""

    def __init__(self) -> None:
        self.x: torch.Tensor | None = None
        self.version = -1
        self.ready: dict[int, tuple[torch.Tensor, Any]] = {}
        self.last: Any = None
        self.last_version = -1
        self.runs: list[list[int]] = []


class _Slots(threading.local):
    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[SiblingGroup, _Slot] = weakref.WeakKeyDictionary()


_slots = _Slots()


class SiblingGroup:
    """Layers of one parent that may share an input.

    Attributes:
        layers: the siblings.
        runs: indices of layers that share one; None until decided.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.runs: tuple[tuple[int, ...], ...] | None = None
        self._seen: tuple[tuple[int, ...], ...] | None = None
        self._pending: weakref.WeakSet[_Graph] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "runs": self.runs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy notes for itself: graphs that wait are not its own.
        self.__init__(state["layers"])
        self.runs = state["runs"]

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
        self.decide()
        for run in self.runs or ():
            if run[0] == mine:
                return self._together(slot, run, x, names)
        y = layer.alone(x, names)
        if self.runs is None and y is not None:
            self._note(slot, mine, x, y)
        return y

    def _together(self, slot: _Slot, run: tuple[int, ...], x: torch.Tensor, names: list[str]) -> torch.Tensor | None:
        first = self.layers[run[0]].prepare(x, names)
        if first is None or first.member.dropouts:
            return self.layers[run[0]].alone(x, names)
        prepared = [first]
        waiting = []
        for index in run[1:]:
            layer = self.layers[index]
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

    def _note(self, slot: _Slot, mine: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Note in which order and with which tensors the layers are called, until one is called again."""
        if y.requires_grad:
            graph = _Graph()
            self._pending.add(graph)
            # Only the graph holds the hook, and the hook holds this: it goes with the graph, or when backward has come.
            y.register_hook(functools.partial(_done, self._pending, graph))
        if any(mine in run for run in slot.runs):
            if self._seen is None:
                self._seen = tuple(tuple(run) for run in slot.runs)
            slot.runs = []
        if slot.runs and slot.last() is x and slot.last_version == x._version:
            slot.runs[-1].append(mine)
        else:
            slot.runs.append([mine])
        slot.last, slot.last_version = weakref.ref(x), x._version

    def decide(self) -> None:
        """Settle the runs if a whole forward has been seen and no graph waits for its backward."""
        # Inside a backward a forward is repeated (checkpointing), and must keep what it kept the first time.
        if self.runs is not None or torch._C._current_graph_task_id() != -1:
            return
        slot = _slots.of.get(self)
        complete = slot is not None and sum(map(len, slot.runs)) == len(self.layers)
        seen = self._seen or (tuple(tuple(run) for run in slot.runs) if slot is not None and complete else None)
        if seen is not None and not self._pending:
            self.runs = tuple(run for run in seen if len(run) > 1)


class _Graph:
    """Stands for the part of a graph that one call made."""


def _done(pending: weakref.WeakSet[_Graph], graph: _Graph, gradient: torch.Tensor) -> None:
    pending.discard(graph)


def _key(layer: Any, names: list[str], x: torch.Tensor) -> Any:
    """Return what a layer's result depends on besides x: whoever changes it in between gets a result of its own."""
    tensors = [*layer.factor_tensors(names), layer._modules["base_layer"]._parameters["weight"]]
    state = (layer.training, torch.is_autocast_enabled(x.device.type), torch.is_grad_enabled())
    return state, tuple(names), layer.scalings(names), [(id(t), t._version) for t in tensors]


def join_siblings(model: nn.Module) -> None:
    """Make a group of the linear LoRA layers that each module of `model` holds directly, where there are several."""
    from .fused import FusedLinear

    for parent in model.modules():
        held = [child for child in parent._modules.values() if isinstance(child, FusedLinear)]
        if len(held) > 1:
            group = SiblingGroup(held)
            for layer in held:
                layer.__dict__["siblings"] = group
