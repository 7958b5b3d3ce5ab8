"""State dicts in timm's own names: without the `base_layer` and `modules_to_save` that PEFT's wrappers put into them.

blocks.0.attn.qkv.weight                    the base's, as in a plain timm model
blocks.0.attn.qkv.lora_A.default.weight     the adapter's
head.weight                                 a module that is trained whole: its trained copy
head.original_module.weight                 what it was before, which computes while the adapter is disabled
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from lora_adapters.errors import CheckpointError
from lora_adapters.weights import store_for

_ORIGINAL = "original_module."


def _renamed(model: nn.Module, adapter: str) -> Iterator[tuple[str, str]]:
    """Yield (PEFT's prefix, own prefix) of every wrapped module's state."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield f"{name}.base_layer.", f"{name}."
        elif isinstance(module, ModulesToSaveWrapper):
            yield f"{name}.modules_to_save.{adapter}.", f"{name}."


def to_own(model: nn.Module, state: dict[str, Any], prefix: str, adapter: str) -> None:
    """Rename the keys of a model's state dict in place; their order stays.

    Args:
        model: what the state is of.
        state: as nn.Module.state_dict fills it.
        prefix: of the model's keys in it.
        adapter: the adapter whose trained modules count.
    """
    names = {prefix + theirs: prefix + own for theirs, own in _renamed(model, adapter)}
    items = list(state.items())
    state.clear()
    state.update({_swap(key, names): value for key, value in items})


def from_own(model: nn.Module, state: dict[str, Any], prefix: str, adapter: str) -> None:
    """Rename the keys back in place. A plain timm checkpoint gives a module that is trained whole both its copies."""
    names = {prefix + own: prefix + theirs for theirs, own in _renamed(model, adapter)}
    wrapped = [prefix + n + "." for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    for key in list(state):
        owner = next((w for w in wrapped if key.startswith(w)), None)
        if owner is not None and not key.startswith((owner + _ORIGINAL, owner + "modules_to_save.")):
            state.setdefault(f"{owner}{_ORIGINAL}{key.removeprefix(owner)}", state[key])
    for key in list(state):
        if (own := next((o for o in names if key.startswith(o)), None)) and not _is_adapters(key.removeprefix(own)):
            state[names[own] + key.removeprefix(own)] = state.pop(key)


def check_quantized(model: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Check that a state dict in PEFT's names has the quantized weights of the model, and drop their statistics.

    Modules with packed weights can save their statistics, but not load them: the weight is what it is already.

    Raises:
        CheckpointError: a weight is another one, or dense. Nothing has been loaded then.
    """
    for name, module in model.named_modules():
        store = store_for(module)
        if store is None or store.format == "dense" or isinstance(module, LoraLayer):
            continue
        for key, value in module.state_dict(prefix=f"{prefix}{name}.").items():
            if key == f"{prefix}{name}.bias" or key not in state:
                continue
            given = state[key]
            if given.dtype != value.dtype or not torch.equal(given.to(value.device), value):
                raise CheckpointError(
                    f"{name!r} is held in {store.format} and the state dict has another weight for it. A quantized base "
                    "can't take other weights: load them before it is quantized. Nothing was loaded."
                )
            if key.removeprefix(f"{prefix}{name}.") not in (*module._parameters, *module._buffers):
                del state[key]


def _is_adapters(rest: str) -> bool:
    return rest.startswith(("lora_", "base_layer.", "modules_to_save.", _ORIGINAL))


def _swap(key: str, names: Mapping[str, str]) -> str:
    found = next((prefix for prefix in names if key.startswith(prefix)), None)
    return key if found is None else names[found] + key.removeprefix(found)


def without_adapter_keys(keys: list[str]) -> list[str]:
    """Return the keys that a plain timm checkpoint should hold, too."""
    return [key for key in keys if not any(part.startswith("lora_") for part in key.split("."))]


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of the plain model that a merged one computes as: timm's keys, nothing packed.

    Args:
        model: a timm model whose adapters, if any, are merged.
    """
    return dict(_plain(model, ""))


def _plain(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(module, LoraLayer):
        module = module.get_base_layer()
    elif isinstance(module, ModulesToSaveWrapper):
        names = module.active_adapters
        module = module.modules_to_save[names[0]] if names and not module.disable_adapters else module.original_module
    store = store_for(module)
    if store is not None and store.format != "dense":
        module = store.dense_module(store.read())
    own: dict[str, Any] = {}
    module._save_to_state_dict(own, prefix, keep_vars=False)
    yield from own.items()
    for name, child in module.named_children():
        yield from _plain(child, f"{prefix}{name}.")
