"""What a model shares: one module registered under several names, and one weight held by several modules.

A shared module is one layer: it gets one adapter, and whatever replaces it replaces it under every name. Modules that
share a weight are layers of their own: each gets its adapter, and nothing may change the weight under the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def places_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return id(child) -> every (parent, attribute) that holds it. Keeps no child alive, so that each can be freed."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for leaf, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, leaf))
    return places


def put(places: list[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Register `module` in each of these places, instead of what is there."""
    for parent, leaf in places:
        # Straight into the registry: a module replaces a module, so __setattr__ has nothing to check.
        parent._modules[leaf] = module


def held_twice(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of the named modules that several parents hold, or one parent under several attributes.

    A module inside a shared parent is not one of them: its only place is that parent.
    """
    places = places_of(model)
    return [name for name in names if len(places[id(model.get_submodule(name))]) > 1]


def other_names(model: nn.Module) -> dict[str, str]:
    """Return every further name of a module -> its first name, the one that `named_modules` gives."""
    modules = list(model.modules())
    if len(modules) == 1 + sum(len(module._modules) for module in modules):
        return {}
    first = {id(module): name for name, module in model.named_modules()}
    every = model.named_modules(remove_duplicate=False)
    return {name: first[id(module)] for name, module in every if name != first[id(module)]}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return module name -> reason, for every module whose weight another module holds too (a head and an embedding).

    Quantizing one end would leave the other dense or change it, so callers refuse these. The same module object under
    two names is not tied: it is one module.
    """
    owners: dict[Any, dict[int, list[str]]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(_identity(parameter), {}).setdefault(id(module), [])
    owners = {key: modules for key, modules in owners.items() if len(modules) > 1}
    if not owners:
        return {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None and id(module) in owners.get(_identity(weight), ()):
            owners[_identity(weight)][id(module)].append(name)
    tied: dict[str, str] = {}
    for modules in owners.values():
        for mine, names in modules.items():
            others = [other for key, found in modules.items() if key != mine for other in found]
            for name in names:
                tied[name] = f"its weight is also the weight of {', '.join(others) or 'another parameter'}"
    return tied


def _identity(parameter: nn.Parameter) -> Any:
    if type(parameter) is nn.Parameter and parameter.numel() and parameter.device.type != "meta":
        return (parameter.device, parameter.data_ptr())
    return id(parameter)
