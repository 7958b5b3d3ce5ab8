"""Adapters between the layers of a component and tensors: out of it with a config that is true, and into it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_adapters.adapter_config import CONFIG_NAME
from lora_adapters.adapter_file import PREFIX, inspect_adapter
from lora_adapters.attach_plan import AttachPlan
from lora_adapters.checkpoint import write_adapter
from lora_adapters.errors import CheckpointError, LoraAdaptersError, UnsupportedError
from lora_adapters.inject import build_config
from lora_adapters.planning import make_plan
from lora_adapters.request import AttachRequest
from lora_adapters.saving import checked_plan

from . import loading, weights_file

#: Fields of a config that say what the layers compute, beside ranks and alphas.
_CARRIED = ("use_rslora", "use_dora", "lora_bias")


def carried_layers(model: nn.Module, name: str) -> dict[str, Any]:
    """Return module name -> layer, of the layers that carry the adapter `name`."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {n: layer for n, layer in layers.items() if name in layer.lora_A or name in layer.lora_embedding_A}


def take_out(model: Any, name: str) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Return an adapter's tensors, and a config made from the layers themselves.

    Ranks are those of the tensors and alphas give the adapter's own scales, whatever weight it is set to now: a layer
    that was padded or swapped is no longer what its old config says.

    Raises:
        UnsupportedError: diffusers' format has no place for what the adapter trained (biases, whole modules, embeddings).
    """
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    tensors = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    if strange := [key for key in tensors if weights_file.module_of(key) == key]:
        raise UnsupportedError(
            f"diffusers' format holds LoRA on linear and convolution layers only, and this adapter has {strange[0]!r}. "
            "Save it as a PEFT folder: adapter.save(folder)."
        )
    for module, layer in carried_layers(model, name).items():
        if getattr(layer.get_base_layer(), "groups", 1) > 1:
            raise UnsupportedError(
                f"{module!r} is a convolution with groups, whose adapter stock diffusers can't load. Save it as a PEFT "
                "folder (adapter.save(folder)), or leave it out of targets."
            )
    return tensors, build_config(model, plan_as_is(model, name))


def plan_as_is(model: Any, name: str) -> AttachPlan:
    """Return the plan of an adapter's layers as they are now: the ranks of their tensors, the scales without weights."""
    config = model.peft_config[name]
    exact = {}
    for module, layer in carried_layers(model, name).items():
        rank = layer.lora_B[name].weight.shape[1]
        exact[module] = (rank, _alpha_for(layer, name, rank))
    kept = {field: value for field in _CARRIED if (value := getattr(config, field))}
    request = AttachRequest.make(exact=exact, dropout=config.lora_dropout, modules_to_save=(), **kept)
    return make_plan(model, request)


def _alpha_for(layer: Any, name: str, rank: int) -> float:
    """Return the alpha that gives a layer's own scale at this rank."""
    own, alpha = layer.r[name], layer.lora_alpha[name]
    if own == rank:
        return alpha
    return alpha * math.sqrt(rank / own) if layer.use_rslora.get(name) else alpha * rank / own


@contextmanager
def as_folders(
    components: Mapping[str, nn.Module],
    source: str | Path | Mapping[str, torch.Tensor],
    weight_name: str | None,
    revision: str | None = None,
) -> Iterator[dict[str, Path]]:
    """Give what a source holds as component -> PEFT folder; see `LoraPipeline.load`. Temporary ones go afterwards.

    Raises:
        CheckpointError: there is no such source, or it is damaged or for another pipeline. UnsupportedError: its format.
    """
    with ExitStack() as stack:
        if isinstance(source, (str, Path)):
            path = loading.adapter_path(str(source), weight_name or weights_file.WEIGHT_NAME, revision)
            if (path / CONFIG_NAME).is_file():
                yield {_component_for(path, components): path}
                return
            source = weights_file.find_file(path, weight_name)
        parts = weights_file.read(source, components)
        yield {name: stack.enter_context(_as_folder(components[name], part)) for name, part in parts.items()}


def _component_for(folder: Path, components: Mapping[str, nn.Module]) -> str:
    """Return the component that a PEFT folder's adapter was made for."""
    file, reasons = inspect_adapter(folder), []
    for name, module in components.items():
        try:
            checked_plan(module, file)
        except LoraAdaptersError as error:
            reasons.append(f"{name}: {error}")
        else:
            return name
    raise CheckpointError(f"{folder} fits no component of this pipeline. {' '.join(reasons)}")


@contextmanager
def _as_folder(model: nn.Module, part: weights_file.Part) -> Iterator[Path]:
    """Give a component's part of a file as a PEFT folder, which everything that restores checks in full."""
    names = [name for name, _ in model.named_modules() if ".lora_" not in name and ".base_layer" not in name]
    part = _renamed(part, set(names))
    tensors = {PREFIX + key: value for key, value in part.tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        yield write_adapter(folder, weights_file.config_of(part, names), tensors)


def _renamed(part: weights_file.Part, names: set[str]) -> weights_file.Part:
    """Follow transformers 5, whose CLIP text model has lost the level `text_model`, in either direction."""
    if names.issuperset(part.modules):
        return part
    level = "text_model."
    for change in (lambda key: key.removeprefix(level), lambda key: level + key):
        if names.issuperset(map(change, part.modules)):
            tensors: Mapping[str, torch.Tensor] = {change(key): value for key, value in part.tensors.items()}
            config = part.config and _renamed_config(part.config, change)
            return weights_file.Part(tensors, config)
    return part


def _renamed_config(config: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """Rename the keys of a config that are whole names; ends of names and expressions mean the same modules as before."""

    def name(key: str) -> str:
        return change(key) if key.startswith(("text_model.", "encoder.")) else key

    out = dict(config)
    if isinstance(out.get("target_modules"), list):
        out["target_modules"] = [name(key) for key in out["target_modules"]]
    for field in ("rank_pattern", "alpha_pattern"):
        out[field] = {name(key): value for key, value in (out.get(field) or {}).items()}
    return out
