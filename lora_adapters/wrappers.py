"""PEFT's wrappers around the modules that adapters train whole, where PEFT or others leave them wrong.

- PEFT goes by the ends of names, so "head" also means "head.head", and it wraps a part of what it wrapped already: the
  inner copy is saved, and never runs. `unnest` takes these out.
- `model.reset_classifier(n)` after attaching puts a plain module where the wrapper was, so the adapter would neither train
  nor save it. `check_in_place` says so; `rewrap` brings the new module under the adapters.
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


def unnest(model: nn.Module) -> None:
    """Take out the wrappers that PEFT put into wrappers, and let the outer ones train all of their copies again."""
    for outer in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        inner = [leaf for leaf in outer._modules if leaf not in ("original_module", "modules_to_save")]
        for leaf in inner:
            del outer._modules[leaf]
        held = [(m, leaf, c) for m in outer.modules() for leaf, c in m._modules.items() if m is not outer]
        nested = [(parent, leaf, child) for parent, leaf, child in held if isinstance(child, ModulesToSaveWrapper)]
        for parent, leaf, child in nested:
            parent._modules[leaf] = child.original_module
        if inner or nested:
            frozen = not any(p.requires_grad for p in outer.modules_to_save.parameters())
            outer.set_adapter(outer.active_adapters, inference_mode=frozen)


def within_trained(model: nn.Module, plan: AttachPlan) -> list[str]:
    """Return what PEFT's rule of names would wrap inside a module that is trained whole: "head.head" for "head"."""
    return [
        f"{place}.{inner}"
        for place, module in trained_whole(model, plan).items()
        for inner, _ in getattr(module, "original_module", module).named_modules()  # type: ignore[union-attr]
        if inner and inner.endswith((*plan.trained, *plan.norms))
    ]


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
    refuse_replaced(model, plan)


def refuse_replaced(model: nn.Module, plan: AttachPlan) -> None:
    """Raise StateError if a module that the plan trains whole was replaced since attaching."""
    name = plan.request.adapter_name
    if new := replaced(model, plan):
        raise StateError(
            f"{new[0]!r} was replaced after attaching (by reset_classifier, say), so adapter {name!r} neither trains nor "
            "saves what is there now. Call adapter.rewrap_trained(), before making the optimizer."
        )


def _carries(module: Any, name: str) -> bool:
    return isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A)


def rewrap(
    model: nn.Module, names: Iterable[str], originals: Mapping[str, nn.Module], holders: list[str], active: list[str]
) -> None:
    """Put PEFT's wrapper around modules that replaced trained ones.

    Args:
        model: the base.
        names: where the new modules are.
        originals: name -> the base's own module, which computes while no adapter is active.
        holders: the adapters that train these modules and have lost them. The first of them that is active takes the new
            module itself (the first, if none is), the others get copies.
        active: the model's active adapters.
    """
    mine = [name for name in active if name in holders]
    first = (mine or holders)[0]
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        new = model.get_submodule(name)
        wrapper = ModulesToSaveWrapper(originals[name], first)
        wrapper.modules_to_save[first] = new
        for other in holders:
            if other != first:
                wrapper.update(other)
                wrapper.modules_to_save[other] = copy.deepcopy(new).requires_grad_(False)
        wrapper.train(new.training)
        model.get_submodule(parent_name)._modules[leaf] = wrapper
        wrapper.set_adapter([first] if mine else [])


def trained_values(model: nn.Module, plan: AttachPlan) -> int:
    """Return the number of values in the adapter's own copies of the modules it trains whole."""
    name = plan.request.adapter_name
    wrappers = (m for m in trained_whole(model, plan).values() if isinstance(m, ModulesToSaveWrapper))
    copies = [wrapper.modules_to_save[name] for wrapper in wrappers if name in wrapper.modules_to_save]
    return sum({id(p): p.numel() for module in copies for p in module.parameters()}.values())
