"""Remembers a model's structure, finds what was changed since, and takes exactly that back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_ABSENT = object()


@dataclass
class Changes:
    """Differences between a snapshot and a later state of the same modules."""

    attributes: list[tuple[dict[str, Any], Any, Any]] = field(default_factory=list)
    flags: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    values: list[tuple[nn.Parameter, torch.Tensor]] = field(default_factory=list)

    def record(self, module: nn.Module, attribute: str) -> None:
        """Remember an attribute of a module, or that it has none of its own, before it is set."""
        self.attributes.append((vars(module), attribute, vars(module).get(attribute, _ABSENT)))

    def revert(self) -> None:
        """Set every changed attribute, child, hook and flag back; leave what was changed elsewhere alone."""
        for container, key, old in reversed(self.attributes):
            if old is _ABSENT:
                container.pop(key, None)
            else:
                container[key] = old
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for parameter, value in self.values:
                parameter.copy_(value)


class Snapshot:
    """The structure of a model: every module's attributes, children, hooks, and every parameter's requires_grad.

    Args:
        model: what to remember. No weight is copied.
        keep_values: parameters whose values are to be remembered too (a copy of each is kept).
    """

    def __init__(self, model: nn.Module, keep_values: Iterable[nn.Parameter] = ()) -> None:
        self._modules = [(module, self._copy(module)) for module in model.modules()]
        self._order = [(module, list(module._modules)) for module, _ in self._modules]
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._values = [(parameter, parameter.detach().clone()) for parameter in keep_values]

    @staticmethod
    def _copy(module: nn.Module) -> dict[str, Any]:
        return {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}

    def changes(self) -> Changes:
        """Return what differs now, in the modules that existed then."""
        found = Changes(values=list(self._values))
        found.flags = [(p, flag) for p, flag in self._flags if p.requires_grad != flag]
        for module, before in self._modules:
            now = vars(module)
            for key in {**before, **now}:
                old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
                if isinstance(old, dict) and isinstance(new, dict):
                    self._compare(old, new, found)
                elif old is not new:
                    found.attributes.append((now, key, old))
        return found

    @staticmethod
    def _compare(old: dict[Any, Any], new: dict[Any, Any], found: Changes) -> None:
        for key in {**old, **new}:
            if old.get(key, _ABSENT) is not new.get(key, _ABSENT):
                found.attributes.append((new, key, old.get(key, _ABSENT)))
