"""The roles of a timm model's modules, from its structure and its pretrained_cfg."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lora_adapters.hooks.specs import TargetMap
from lora_adapters.targets import Classification, ModelInfo


def classify(info: ModelInfo, maps: Iterable[TargetMap]) -> Classification:
    """Return the roles of a model's modules."""
    heads = classifiers(info.model)
    roles = {}
    for name, module in info.modules.items():
        base = getattr(module, "get_base_layer", lambda module=module: module)()
        if any(name == head or name.startswith(head + ".") for head in heads):
            roles[name] = "head"
        elif isinstance(base, (nn.Conv1d, nn.Conv2d)):
            roles[name] = "conv"
        else:
            roles[name] = "embedding" if isinstance(base, nn.Embedding) else "other"
    return Classification(roles, {}, "all-linear" if "other" in roles.values() else "conv")


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that `get_classifier()` gives."""
    get = getattr(model, "get_classifier", None)
    found = get() if get is not None else None
    parts = list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    wanted = {id(part) for part in parts if isinstance(part, nn.Module) and any(True for _ in part.parameters())}
    return tuple(name for name, module in model.named_modules() if id(module) in wanted)
