"""Gives every module of a diffusers model its role, from its place in the model and the end of its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from lora_adapters.direct_reads import owners_of, why_not_called
from lora_adapters.hooks.specs import TargetMap
from lora_adapters.targets import Classification, ModelInfo, classify_by_patterns

from . import targets

FUSED_REASON = "fuse_qkv_projections copied its weight into a fused projection, and it is no longer called"


def classify(info: ModelInfo, maps: Iterable[TargetMap]) -> Classification:
    """Return the role of every module: what a target map says, else what the structure says."""
    known = classify_by_patterns(info, maps)
    by_name = dict(info.model.named_modules(remove_duplicate=False))
    roles: dict[str, str] = {}
    never = dict(known.never)
    for name, module in info.modules.items():
        module = getattr(module, "base_layer", module)
        owners = list(owners_of(name, by_name))
        roles[name] = known.roles.get(name) or _role(name, module, owners)
        if name not in never and (reason := _never(module, owners)):
            never[name] = reason
    default = known.default if {"q", "qkv", "k", "kv"} & set(roles.values()) else _without_attention(roles)
    return Classification(roles, never, default, (*known.notes, *_notes(info.model)))


def _without_attention(roles: dict[str, str]) -> str:
    return next((role for role in ("mlp", "conv") if role in roles.values()), "all-linear")


def _role(name: str, module: nn.Module, owners: list[tuple[str, nn.Module]]) -> str:
    """Return the role that the structure says. `owners` are (path to the module, ancestor), the nearest first."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if re.search(targets.INPUT_NAMES, name):
        return "embedding"
    if re.search(targets.OUTPUT_NAMES, name):
        return "head"
    classes = [type(owner).__name__ for _, owner in owners[:-1]]
    place = targets.place_of(classes)
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d)
    if convolution and (place == "resnet" or max(module.kernel_size) > 1):
        return "conv"
    if place == "time" or re.search(targets.TIME_NAMES, name):
        return "time"
    if place == "attention":
        return targets.attention_role(name) or "other"
    parallel = name.endswith("proj_out") and classes and re.search(targets.PARALLEL_BLOCK, classes[0])
    if place == "mlp" or parallel or (place in ("", "resnet") and re.search(targets.MLP_NAMES, name)):
        return "mlp"
    if place == "router" and name.rpartition(".")[2] in ("gate", "router"):
        return "router"
    return "head" if place == "head" and not re.search(r"modulation|norm", name) else "other"


def _never(module: nn.Module, owners: list[tuple[str, nn.Module]]) -> str:
    path, owner = owners[0]
    fused = getattr(owner, "fused_projections", False) is True
    if fused and hasattr(owner, "to_qkv" if hasattr(owner, "to_qkv") else "to_kv"):
        names = ("to_k", "to_v", *(("to_q",) if hasattr(owner, "to_qkv") else ()))
        added = ("add_q_proj", "add_k_proj", "add_v_proj") if hasattr(owner, "to_added_qkv") else ()
        if path in (*names, *added):
            return FUSED_REASON
    return why_not_called(module, owners)


def _notes(model: nn.Module) -> Iterator[str]:
    bare = [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and "expert" in (prefix + type(module).__name__).lower()
    ]
    if bare:
        yield (
            f"{len(bare)} weights of experts (first {bare[0]!r}) are 3-dimensional parameters, which no LoRA layer "
            "reaches: they stay as they are."
        )
    volumes = [name for name, module in model.named_modules() if isinstance(module, nn.Conv3d)]
    if volumes:
        yield f"{len(volumes)} 3-d convolutions (first {volumes[0]!r}) have no adapter layer and stay as they are."
