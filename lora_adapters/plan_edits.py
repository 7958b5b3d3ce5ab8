"""Edits of a plan by plugins."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .attach_plan import AttachPlan, PlannedLayer, SkippedLayer, adapter_parameters
from .errors import NoTargetError, PluginError
from .hooks.manager import plugins
from .hooks.specs import PlanEdit
from .request import AttachRequest, check_alpha, check_pattern, check_rank

if TYPE_CHECKING:
    pass


def edited(plan: AttachPlan) -> AttachPlan:
    """Apply the plugins' edits; two plugins that want different things of one layer are an error naming both."""
    layers = {layer.name: layer for layer in plan.layers}
    skipped = list(plan.skipped)
    asked: dict[tuple[str, str], tuple[str, Any]] = {}
    for plugin, edit in plugins().collect("lora_adapters_edit_plan", PlanEdit, plan=plan):
        for name in [n for n in layers if check_pattern(edit.pattern).search(n)]:
            for what in ("rank", "alpha", "skip"):
                value = getattr(edit, what)
                if value in (None, ""):
                    continue
                other = asked.setdefault((name, what), (plugin, value))
                if other[1] != value:
                    raise PluginError(
                        f"Plugins {other[0]!r} and {plugin!r} disagree on the {what} of {name!r}: {other[1]!r} and "
                        f"{value!r}. Block one of them with LORA_ADAPTERS_DISABLE."
                    )
    for (name, what), (plugin, value) in asked.items():
        if what == "skip":
            layer = layers.pop(name, None)
            if layer:
                skipped.append(SkippedLayer(name, layer.role, f"{value} (plugin {plugin!r})"))
        elif name in layers:
            layers[name] = _edit_layer(layers[name], what, value, plan.request)
    if not layers:
        raise NoTargetError("The plugins' edits leave no layer to adapt. See LORA_ADAPTERS_TRACE=1.")
    notes = plan.notes
    if asked:
        edits = Counter(plugin for plugin, _ in asked.values())
        notes += tuple(f"plugin {plugin!r} edited {count} values of the plan" for plugin, count in edits.items())
    return replace(plan, layers=tuple(layers.values()), skipped=tuple(skipped), notes=notes)


def _edit_layer(layer: PlannedLayer, what: str, value: Any, request: AttachRequest) -> PlannedLayer:
    if layer.parts and what in ("rank", "alpha"):
        raise PluginError(
            f"A plugin edits the {what} of {layer.name!r}, which is adapted in parts: only `skip` goes there."
        )
    rank = check_rank(value, f"rank of {layer.name}") if what == "rank" else layer.rank
    alpha = check_alpha(value, f"alpha of {layer.name}") if what == "alpha" else layer.alpha
    if what == "rank" and request.alpha is None and layer.alpha == layer.rank:
        alpha = rank
    lora_bias = bool(request.peft_fields.get("lora_bias"))
    parameters = adapter_parameters(layer.kind, layer.shape, rank, lora_bias)
    return replace(layer, rank=rank, alpha=alpha, scaling=request.scaling(rank, alpha), parameters=parameters)
