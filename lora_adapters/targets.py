"""Roles of a model's modules, and the role expressions that select them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .hooks.specs import ROLES, TargetMap

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Words of a role expression that stand for several roles.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o", "qkv", "kv"),
    "all-linear": ("q", "k", "v", "o", "qkv", "kv", "mlp", "time", "other"),
}


#: Rows of a weight, as (first, end) ranges in ascending order.
Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """One of the projections that a fused layer holds, adapted by ranks of its own.

    Attributes:
        role: "q", "k" or "v".
        rank: how many of the layer's ranks are its own, after those of the parts before it.
        rows: the rows of the layer's weight that these ranks change, as (first, end) ranges.
    """

    role: str
    rank: int
    rows: Rows


@dataclass(frozen=True)
class ModelInfo:
    """What the matcher may look at: names, classes and shapes, never values.

    Attributes:
        backend: name of the backend that serves the model.
        family: transformers' `config.model_type`, else the model's class name.
        modules: dotted module name -> module, in the model's order, of every module that could carry an adapter.
        model: the model itself.
    """

    backend: str
    family: str
    modules: Mapping[str, nn.Module]
    model: nn.Module


@dataclass(frozen=True)
class Classification:
    """Roles of a model's modules.

    Attributes:
        roles: module name -> role.
        never: module name -> the reason it must not be adapted.
        default: the role expression that targets="auto" means for this model.
        notes: things the user should know (shown in the plan).
        unverified: why nobody could check the roles, as a sentence; role expressions are then refused. "" if checked.
        parts: name of a fused projection -> role ("q", "k", "v") -> the rows of its weight that have it.
        reads: name of a module whose weight other code reads without calling it -> who does; such a module can be adapted
            all the same where its backend says so here.
        bounded: True if a layer that a role chose gets no larger rank than makes the adapter as large as the layer.
    """

    roles: Mapping[str, str]
    never: Mapping[str, str]
    default: str
    notes: tuple[str, ...] = ()
    unverified: str = ""
    parts: Mapping[str, Mapping[str, Rows]] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)
    bounded: bool = False


class Backend(Protocol):
    """What a framework's plugin gives the core. Every method works on meta-device models unless it loads weights."""

    name: str

    def family(self, model: nn.Module) -> str:
        """Return the key that TargetMap.families uses."""
        ...

    def classify(self, info: ModelInfo, maps: Iterable[TargetMap]) -> Classification:
        """Return the role of every module that could carry an adapter."""
        ...

    def task_type(self, model: nn.Module) -> str | None:
        """Return PEFT's task type ("CAUSAL_LM", "SEQ_CLS", ...) or None."""
        ...

    def heads_to_train(self, model: nn.Module) -> tuple[str, ...]:
        """Return names of modules that are new for the task (a classifier) and must be trained and saved whole."""
        ...

    def example_inputs(self, model: nn.Module, batch_size: int, sequence_length: int, device: Any) -> dict[str, Any]:
        """Return keyword arguments of one training step's forward (labels included, if the model takes them)."""
        ...

    def can_load(self, name: str, revision: str | None = None) -> bool:
        """Return True if `load` recognises the name or folder. Asked before loading when no backend was named."""
        ...

    def load(
        self,
        name: str,
        *,
        quantization: Any,
        dtype: torch.dtype | str,
        device: str,
        revision: str | None,
        trust_remote_code: bool,
        **kwargs: Any,
    ) -> nn.Module:
        """Load a model by name or folder, its base weights quantized if asked."""
        ...


class Kernels(Protocol):
    """Faster kernels for a base model's own modules, found for it but not in it yet.

    A backend that has some gives them by a method `liger_kernels(model, plan)`, which changes nothing and raises
    UnsupportedError or MissingDependencyError, with the reason, where there are none.
    """

    def apply(self) -> tuple[str, ...]:
        """Put the kernels into the model; return notes for the plan. Raise UnsupportedError, the model unchanged."""
        ...

    def revert(self) -> None:
        """Take the kernels out again, unless they are not in, or others asked for them too."""
        ...


def classify_by_patterns(info: ModelInfo, maps: Iterable[TargetMap]) -> Classification:
    """Give each module the role of the first matching pattern; a family's own map comes before the "*" map."""
    mine = [m for m in maps if m.backend == info.backend]
    chain = [m for m in mine if info.family in m.families]
    if not any(m.exclusive for m in chain):
        chain += [m for m in mine if "*" in m.families]
    roles: dict[str, str] = {}
    never: dict[str, str] = {}
    for name in info.modules:
        for target_map in chain:
            if reason := next((why for p, why in target_map.never.items() if re.search(p, name)), ""):
                never[name] = reason
                break
        for target_map in chain:
            role = next((r for r, ps in target_map.roles.items() if any(re.search(p, name) for p in ps)), None)
            if role is not None:
                roles[name] = role
                break
    default = next((m.default for m in chain if m.default), "all-linear")
    return Classification(roles, never, default)


def expand(word: str) -> tuple[str, ...] | None:
    """Return the roles a word of a role expression stands for, or None if it is no role word."""
    if word in GROUPS:
        return GROUPS[word]
    return (word,) if word in ROLES else None


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return dotted name -> module of everything that could carry an adapter, in the model's order.

    That is linear, 1-d and 2-d convolution and embedding layers. A layer that PEFT wrapped counts once, under its own
    name; the inside of PEFT's wrappers does not count.
    """
    from .weights import layer_kind

    found: dict[str, nn.Module] = {}
    inside = "\0"
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if _is_peft_wrapper(module):
            inside = name + "."
            if hasattr(module, "base_layer"):
                found[name] = module
        elif name and layer_kind(module) is not None:
            found[name] = module
    return found


def _is_peft_wrapper(module: nn.Module) -> bool:
    return any(
        cls.__module__.startswith("peft.") and cls.__name__ in ("BaseTunerLayer", "AuxiliaryTrainingWrapper")
        for cls in type(module).__mro__
    )
