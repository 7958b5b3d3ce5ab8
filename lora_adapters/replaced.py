"""Modules that someone put in the place of those an adapter trains: `model.reset_classifier(n)` after attaching.

Such a call puts a plain module where PEFT's wrapper was, so the adapter would neither train nor save it, and nothing would
say so. `check_in_place` says so; `rewrap` brings the new modules under the adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .attach_plan import AttachPlan
from .errors import StateError
from .trained import modules_meant


def wrapped_originals(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> the base's own module, of everything that adapters train whole."""
    return {n: m.original_module for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}


def trained_whole(model: nn.Module, plan: AttachPlan) -> dict[str, nn.Module]:
    """Return name -> what is there now, of every module that the plan trains and saves whole."""
    names = {name for wanted in plan.trained for name in modules_meant(model, wanted)} | set(plan.norms)
    return {name: model.get_submodule(name) for name in names}


def replaced(model: nn.Module, plan: AttachPlan) -> list[str]:
    """Return the names of trained modules in whose place is something that the adapter does not hold."""
    name = plan.request.adapter_name
    return [
        place
        for place, module in trained_whole(model, plan).items()
        if not (isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save)
    ]


def check_in_place(model: nn.Module, plan: AttachPlan) -> None:
    """Raise StateError if something that the plan adapts or trains was replaced, or is gone, since attaching."""
    name = plan.request.adapter_name
    modules = dict(model.named_modules())
    lost = [layer.name for layer in plan.layers if not _carries(modules.get(layer.name), name)]
    if lost:
        raise StateError(
            f"{lost[0]!r} was replaced after attaching, so adapter {name!r} has nothing there to save. Put the adapter "
            "layer back, or detach and attach again."
        )
    if gone := [wanted for wanted in (*plan.trained, *plan.norms) if not modules_meant(model, wanted)]:
        raise StateError(f"{gone[0]!r}, which adapter {name!r} trains, is no longer in the model: put it back.")
    if new := replaced(model, plan):
        raise StateError(
            f"{new[0]!r} was replaced after attaching (by reset_classifier, say), so adapter {name!r} neither trains nor "
            "saves what is there now. Call adapter.rewrap_trained(), before making the optimizer."
        )


def _carries(module: Any, name: str) -> bool:
    return isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A)


def rewrap(
    model: nn.Module, names: Iterable[str], originals: Mapping[str, nn.Module], active: str, holders: list[str]
) -> None:
    """Put PEFT's wrapper around modules that replaced trained ones.

    Args:
        model: the base.
        names: where the new modules are.
        originals: name -> the base's own module, which computes while no adapter is active.
        active: the adapter that takes the new module itself, and trains it.
        holders: the adapters that train this module; the others get copies.
    """
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        new = model.get_submodule(name)
        wrapper = ModulesToSaveWrapper(originals[name], active)
        wrapper.modules_to_save[active] = new
        wrapper.train(new.training)
        model.get_submodule(parent_name)._modules[leaf] = wrapper
        for other in holders:
            if other != active:
                _copy_for(wrapper, other, new)
        wrapper.set_adapter(active)


def _copy_for(wrapper: ModulesToSaveWrapper, adapter: str, module: nn.Module) -> None:
    wrapper.update(adapter)
    wrapper.modules_to_save[adapter] = copy.deepcopy(module).requires_grad_(False)


def trained_values(model: nn.Module, plan: AttachPlan) -> int:
    """Return the number of values in the adapter's own copies of the modules it trains whole."""
    name = plan.request.adapter_name
    wrappers = (m for m in trained_whole(model, plan).values() if isinstance(m, ModulesToSaveWrapper))
    copies = [wrapper.modules_to_save[name] for wrapper in wrappers if name in wrapper.modules_to_save]
    return sum({id(p): p.numel() for module in copies for p in module.parameters()}.values())
