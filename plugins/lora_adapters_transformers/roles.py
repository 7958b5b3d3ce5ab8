"""Gives every module of a transformers model its role, from its place in the model and the end of its name."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lora_adapters.hooks.specs import TargetMap
from lora_adapters.targets import Classification, ModelInfo, classify_by_patterns

from . import targets
from .tasks import head_modules

#: `self.x.weight`, but not a test of its type, nor a look at its dtype, device, shape or other facts, nor a clamp of
#: its data in place.
_WEIGHT_READ = re.compile(
    r"(?<!isinstance\()self\.(\w+)\.weight\b(?!\.(data\.clamp_|dtype|device|shape|ndim|size|numel|is_|"
    r"requires_grad|data_ptr|element_size|grad))"
)
#: Methods that run when a model is built or tied, not when it computes.
_SETUP = re.compile(r"init|reset|tie|resize|prune|load|convert|set_|get_|quantize")


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
        owners = list(_owners(name, by_name))
        place, _ = targets.place_of([type(owner).__name__ for owner in owners])
        mixers = mixers or place in ("mixer", "linear attention")
        roles[name] = known.roles.get(name) or _role(name, module, place, _inside(name, heads))
        if name not in never and (reason := _never(name, module, owners)):
            never[name] = reason
    default = "all-linear" if mixers else known.default
    vouched = any(info.family in m.families and m.roles for m in maps if m.backend == info.backend)
    unverified = "" if vouched else targets.UNVERIFIED.get(info.family, "")
    notes = (*known.notes, *_notes(info, mixers))
    return Classification(roles, never, default, known.shared_input, notes, unverified)


def _owners(name: str, by_name: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """Yield a module's ancestors, the nearest first."""
    while name:
        name = name.rpartition(".")[0]
        owner = by_name.get(name)
        if owner is not None and not isinstance(owner, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield owner


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


def _never(name: str, module: nn.Module, owners: list[nn.Module]) -> str:
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return targets.MHA_REASON
    cls = type(module)
    if isinstance(module, nn.Linear) and _has_own_forward(cls) and cls.__name__ not in targets.PLAIN_LINEARS:
        return targets.NOT_PLAIN_REASON.format(cls=cls.__name__)
    if not owners:
        return ""
    owner = type(owners[0])
    leaf = name.rpartition(".")[2]
    if leaf in targets.CALLED.get(owner.__name__, ()):
        return ""
    if leaf in _read_directly(owner):
        return targets.DIRECT_REASON.format(owner=owner.__name__)
    return ""


def _has_own_forward(cls: type[nn.Module]) -> bool:
    definer = next((c for c in cls.__mro__ if "forward" in vars(c)), cls)
    return definer.__module__.split(".")[0] in ("transformers", "transformers_modules")


@functools.cache
def _read_directly(owner: type[nn.Module]) -> frozenset[str]:
    """Return names of the children whose weight the class's own source reads while it computes."""
    found: set[str] = set()
    for cls in owner.__mro__:
        if cls.__module__.split(".")[0] == "torch":
            break
        for name, method in vars(cls).items():
            if not inspect.isfunction(method) or _SETUP.search(name):
                continue
            found |= _weights_in(method)
    return frozenset(found)


def _weights_in(method: Any) -> set[str]:
    try:
        source = inspect.getsource(method)
    except (OSError, TypeError):  # no source on this machine: what is known as data still holds
        return set()
    return {match[1] for match in _WEIGHT_READ.finditer(source)}


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
