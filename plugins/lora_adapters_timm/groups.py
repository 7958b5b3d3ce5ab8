"""timm's layer groups of an adapted model, by which layer decay scales learning rates."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from timm.models._manipulate import group_with_matcher
from timm.optim._param_groups import auto_group_layers
from torch import nn


def group_matcher(base: nn.Module, coarse: bool = False) -> Callable[[str], int]:
    """Return name of a parameter (or module) -> its layer in the plain timm model, counted from the stem.

    Each weight of the model keeps its layer, an adapter has that of the weight it is on, and a trained classifier its own.
    Most timm models bring patterns for this. For the others timm counts off parameters, so they are counted here without
    the adapter's, which would shift them.
    """
    plain = _plain_names(base)
    names = list(dict.fromkeys(plain.values()))
    own = getattr(base, "group_matcher", None)
    if own is not None:
        layers = group_with_matcher(((name, None) for name in names), own(coarse=coarse), reverse=True)
    else:
        config = getattr(base, "pretrained_cfg", None) or {}
        stand_in = SimpleNamespace(pretrained_cfg=config, named_parameters=lambda: ((name, None) for name in names))
        layers = auto_group_layers(stand_in)

    def layer_of(name: str) -> int:
        if name in plain:
            return layers[plain[name]]
        inside = (layers[known] for key, known in plain.items() if key.startswith(f"{name}."))
        return next(inside, max(layers.values()))

    return layer_of


def _plain_names(base: nn.Module) -> dict[str, str]:
    """Return name of each parameter -> the name in the plain timm model of the weight that it is, or acts on."""
    modules = dict(base.named_modules())
    found = {}
    for name, _ in base.named_parameters():
        found[name] = name
        parts = name.split(".")
        for end in range(1, len(parts)):
            outer, rest = ".".join(parts[:end]), parts[end:]
            if isinstance(modules.get(outer), LoraLayer):
                found[name] = ".".join([outer, *rest[1:]]) if rest[0] == "base_layer" else f"{outer}.weight"
                break
            if isinstance(modules.get(outer), ModulesToSaveWrapper):
                found[name] = ".".join([outer, *rest[1 if rest[0] == "original_module" else 2 :]])
                break
    return found
