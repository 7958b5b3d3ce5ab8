"""Gives every module of a transformers model its role, from its place in the model and the end of its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from lora_adapters.direct_reads import owners_of, why_not_called
from lora_adapters.hooks.specs import TargetMap
from lora_adapters.targets import Classification, ModelInfo, classify_by_patterns

from . import targets
from .tasks import head_modules


def classify(info: ModelInfo, maps: Iterable[TargetMap]) -> Classification:
    """Return the role of every module: what a target map says, else what the structure says."""
    maps = tuple(maps)
    known = classify_by_patterns(info, maps)
    heads = head_modules(info.model)
    roles: dict[str, str] = {}
    never = dict(known.never)
    mixers = False
    by_name = dict(info.model.named_modules(remove_duplicate=False))
    for name, module in info.modules.items():
        module = getattr(module, "base_layer", module)
        owners = list(owners_of(name, by_name))
        place, _ = targets.place_of([type(owner).__name__ for _, owner in owners])
        mixers = mixers or place in ("mixer", "linear attention")
        roles[name] = known.roles.get(name) or _role(name, module, place, _inside(name, heads))
        if name not in never and (reason := _never(module, owners)):
            never[name] = reason
    default = "all-linear" if mixers else known.default
    vouched = any(info.family in m.families and m.roles for m in maps if m.backend == info.backend)
    unverified = "" if vouched else targets.UNVERIFIED.get(info.family, "")
    notes = (*known.notes, *_notes(info, mixers))
    return Classification(roles, never, default, notes, unverified)


def _inside(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def _role(name: str, module: nn.Module, place: str, in_head: bool) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if in_head:
        return "head"
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d)
    if convolution and max(module.kernel_size) > 1:
        return "conv"
    in_attention = place in ("attention", "linear attention")
    if place == "router" or (not in_attention and place != "mixer" and _is_router(name, module)):
        return "router"
    if in_attention:
        role = targets.leaf_role(_without_wrapper(name))
        return role or ("conv" if convolution else "other")
    if place in targets.OTHER_PLACES:
        return "conv" if convolution else "other"
    if place == "mlp" or re.search(targets.MLP_NAMES, name):
        return "mlp"
    return "conv" if convolution else "other"


def _is_router(name: str, module: nn.Module) -> bool:
    """A gate proper is narrow: one value per expert. A gate as wide as the layer is part of a feed-forward."""
    out, inside = getattr(module, "out_features", 0), getattr(module, "in_features", 0)
    return bool(re.search(targets.ROUTER_NAMES, name)) and out < inside


def _without_wrapper(name: str) -> str:
    """Drop a last part that only says the kind of layer (q_proj.linear, output.conv1d)."""
    return re.sub(r"\.(linear|conv1d|conv)$", "", name)


def _never(module: nn.Module, owners: list[tuple[str, nn.Module]]) -> str:
    cls = type(module)
    if isinstance(module, nn.Linear) and _has_own_forward(cls) and cls.__name__ not in targets.PLAIN_LINEARS:
        return targets.NOT_PLAIN_REASON.format(cls=cls.__name__)
    if any(path in targets.CALLED.get(type(owner).__name__, ()) for path, owner in owners):
        return ""
    return why_not_called(module, owners)


def _has_own_forward(cls: type[nn.Module]) -> bool:
    definer = next((c for c in cls.__mro__ if "forward" in vars(c)), cls)
    return definer.__module__.split(".")[0] in ("transformers", "transformers_modules")


def _expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and "expert" in (prefix + type(module).__name__).lower():
                yield f"{prefix}.{name}", parameter


def _notes(info: ModelInfo, mixers: bool) -> Iterator[str]:
    bare = dict(_expert_parameters(info.model))
    if bare:
        count = sum(p.numel() for p in bare.values())
        leaves = sorted({".".join(n.rsplit(".", 2)[-2:]) for n in bare})
        yield (
            f"{count:,} values of the experts are 3-dimensional parameters, which no LoRA layer reaches; "
            f"PEFT's target_parameters={leaves} adapts them."
        )
    if mixers:
        yield "Some layers mix tokens without softmax attention (state space, linear attention): default is all-linear."
    if note := targets.UNREACHABLE.get(info.family):
        yield note
