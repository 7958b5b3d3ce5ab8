"""A plan's layers in groups: repeated blocks share one entry. What the table, the report and the JSON show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .facts import AdaptedGroup, SkippedGroup

if TYPE_CHECKING:
    from ..attach_plan import AttachPlan, PlannedLayer


def _general(name: str) -> str:
    """Return a module's name with its numbers as '*', so that repeated blocks share a row."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def adapted(plan: AttachPlan, run_by: Mapping[str, str]) -> list[AdaptedGroup]:
    """Return the layers to adapt; `run_by` is module name -> what runs it, empty before they are attached."""
    groups: dict[tuple, AdaptedGroup] = {}
    for layer in plan.layers:
        by = run_by.get(layer.name) or ("PEFT's injection" if layer.engine == "peft" else "this package")
        key = (_role(layer), _general(layer.name), layer.shape, layer.rank, layer.scaling, layer.format, by)
        if key not in groups:
            shape = list(layer.shape)
            groups[key] = AdaptedGroup(key[0], key[1], 0, shape, layer.rank, layer.scaling, layer.format, 0, by)
        groups[key].count += 1
        groups[key].base_bytes += layer.weight_bytes
    return list(groups.values())


def _role(layer: PlannedLayer) -> str:
    """Return a layer's role, with the parts that are adapted and their ranks: "qkv: q 8 + v 16"."""
    parts = " + ".join(f"{part.role} {part.rank}" for part in layer.parts)
    return f"{layer.role}: {parts}" if parts else layer.role


def skipped(plan: AttachPlan) -> list[SkippedGroup]:
    """Return what could be adapted and is not, with the reason."""
    groups: dict[tuple[str, str, str], SkippedGroup] = {}
    for layer in plan.skipped:
        key = (layer.role, _general(layer.name), layer.reason)
        groups.setdefault(key, SkippedGroup(key[0], key[1], 0, key[2])).count += 1
    return list(groups.values())
