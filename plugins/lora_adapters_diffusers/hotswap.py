"""Another adapter's values in the place of one that is there: no layer changes, so nothing has to be compiled again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_adapters.adapter_file import PREFIX, inspect_adapter, read_adapter
from lora_adapters.attach_plan import AttachPlan
from lora_adapters.errors import CheckpointError, StateError
from lora_adapters.inject import build_config
from lora_adapters.saving import checked_plan

from .exchange import carried_layers, plan_as_is


def prepare_swap(model: Any, folder: Path, name: str) -> Callable[[], AttachPlan]:
    """Check that a PEFT folder's adapter can take the place of `name`; return the function that puts it there.

    That function returns the plan of the layers as they are then.

    Layers that it does not adapt get B = 0. A smaller rank is padded with zeros. A larger one takes new tensors, unless
    the model was prepared for compiled swaps (`enable_lora_hotswap`), whose shapes must stay.

    Raises:
        CheckpointError: it adapts other layers, or its rank is larger than the model was prepared for.
        StateError: the adapter is merged into the base.
    """
    layers = carried_layers(model, name)
    if any(name in layer.merged_adapters for layer in layers.values()):
        raise StateError(f"Adapter {name!r} is fused: unfuse it before another one takes its place.")
    file = inspect_adapter(folder)
    plan = checked_plan(model, file, name)
    tensors = read_adapter(file)
    planned = {layer.name: layer for layer in plan.layers}
    if strange := [module for module in planned if module not in layers]:
        raise CheckpointError(
            f"The new adapter also adapts {len(strange)} layers that {name!r} does not, first {strange[0]!r}: load it "
            "under a name of its own."
        )
    if any(layer.lora_variant.get(name) for layer in layers.values()) or plan.request.peft_fields.get("use_dora"):
        raise CheckpointError("DoRA can't be swapped: delete the old adapter and load the new one.")
    for module, layer in planned.items():
        rows = layers[module].lora_A[name].weight.shape[0]
        if isinstance(layers[module].scaling[name], torch.Tensor) and layer.rank > rows:
            raise CheckpointError(
                f"The new adapter has rank {layer.rank} in {module!r}, and the model was prepared for {rows}: call "
                "pipe.enable_lora_hotswap(target_rank=...) with the largest rank before the first adapter."
            )

    def swap() -> AttachPlan:
        for module, layer in layers.items():
            new = planned.get(module)
            a, b = (tensors.get(f"{PREFIX}{module}.lora_{f}.weight") for f in "AB") if new else (None, None)
            _fill(layer, name, a, b, new.scaling if new else 0.0)
        now = plan_as_is(model, name)
        model.peft_config[name] = build_config(model, now)
        return now

    return swap


def prepare_compiled_swaps(models: Iterable[Any]) -> None:
    """Do what `enable_lora_hotswap` promised for the first adapter of each model."""
    for model in models:
        if (wanted := getattr(model, "_prepare_lora_hotswap_kwargs", None)) is not None:
            from peft.utils.hotswap import prepare_model_for_compiled_hotswap

            prepare_model_for_compiled_hotswap(model, **wanted)
            model._prepare_lora_hotswap_kwargs = None


def _fill(layer: Any, name: str, a: torch.Tensor | None, b: torch.Tensor | None, scaling: float) -> None:
    """Put A (rank, in, ...) and B (out, rank, ...) into a layer, and its scale. None means B = 0."""
    own_a, own_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    with torch.no_grad():
        if a is None or b is None:
            own_b.zero_()
            return
        if a.shape[0] > own_a.shape[0]:
            own_a.data, own_b.data = _like(a, own_a), _like(b, own_b)
        else:
            own_a.zero_()[: a.shape[0]] = a
            own_b.zero_()[:, : b.shape[1]] = b
    rank = own_a.shape[0]
    layer.r[name] = rank
    layer.lora_alpha[name] = scaling * (rank**0.5 if layer.use_rslora.get(name) else rank)
    if isinstance(layer.scaling[name], torch.Tensor):
        layer.scaling[name].fill_(scaling)
    else:
        layer.scaling[name] = scaling


def _like(value: torch.Tensor, old: nn.Parameter) -> torch.Tensor:
    return value.to(old.device, old.dtype)
