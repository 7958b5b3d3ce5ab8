"""Memory of a DreamBooth step, by the plan: the denoiser's step, and what else is on the device meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from lora_adapters.inject import planned_on_meta
from lora_adapters.memory import StepMemory, predict_step
from lora_adapters.runs.optimizers import make_optimizer

from ..example_inputs import example_inputs

if TYPE_CHECKING:
    from ..recipes import DreamBoothRecipe, DreamBoothTraining
    from .adapters import PipelinePlan
    from .family import Family

#: Optimizers whose memory `lora_adapters.memory` knows by name.
_KNOWN = ("adamw", "adamw_8bit", "prodigy")


def step_memory(
    family: Family,
    plan: PipelinePlan,
    recipe: DreamBoothRecipe,
    rows: int,
    checkpointing: bool,
    device: str,
    autocast: torch.dtype | None,
) -> StepMemory:
    """Predict a training step; see `lora_adapters.runs.runner.Runner.memory`.

    Args:
        family: of the pipeline, whose models may be on the meta device.
        plan: of all that is adapted.
        recipe: says the resolution, the optimizer, and what is cached and so not on the device.
        rows: images of a forward pass, those of the class included.
        checkpointing: with gradient checkpointing.
        device: "cuda", "cpu", ...
        autocast: dtype of the computation.

    Returns:
        The sum of the denoiser's step and those of adapted text encoders, which hold their activations meanwhile, and the
        weights of the VAE and of other encoders where nothing is cached.
    """
    told: dict[str, Any] = {"optimizer": _optimizer(recipe.training), "autocast": autocast, "device": device}
    found = []
    for name, part in plan.parts.items():
        model = getattr(family.pipe, name)
        twin: Any = planned_on_meta(model, part)
        twin = twin.get_base_model()  # PEFT's wrapper hands encoders arguments that they do not take
        if checkpointing:
            set_checkpointing(twin)
        if name == family.denoiser_name:
            inputs = example_inputs(model, rows, "cpu", latents_of(family, recipe.data.resolution))
        else:
            inputs = {"input_ids": torch.zeros(rows, _tokens(family, name), dtype=torch.long)}
        found.append(predict_step(twin, inputs, **told))
    others = [] if recipe.data.cache_latents else ["vae"]
    if recipe.data.cache_text is None:
        others += [name for name in family.text_encoder_names if name not in plan.parts]
    weights = sum(_stored(getattr(family.pipe, name)) for name in others)
    added = {f.name: sum(getattr(one, f.name) for one in found) for f in fields(StepMemory)}
    return StepMemory(**{**added, "weights": added["weights"] + weights, "total": added["total"] + weights})


def latents_of(family: Family, resolution: int | None) -> tuple[int, int]:
    """Return (height, width) of the latents of a square image of the training resolution."""
    side = (resolution or family.resolution) // family.multiple * family.multiple // family.pipe.vae_scale_factor
    return side, side


def set_checkpointing(model: Any) -> None:
    """Turn gradient checkpointing on, of a model of diffusers or transformers."""
    if hasattr(model, "enable_gradient_checkpointing"):
        # Without dropout there is no random state to go back to, and reading one can't be recorded as a CUDA graph.
        way = partial(checkpoint, use_reentrant=False, preserve_rng_state=has_dropout(model))
        model.enable_gradient_checkpointing(gradient_checkpointing_func=way)
    elif hasattr(model, "activation_checkpointing_enable"):  # what newer versions of transformers call it
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def has_dropout(model: nn.Module) -> bool:
    """Return True if a forward in training mode draws which values to leave out."""
    return any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules())


def stop_checkpointing(model: Any) -> None:
    """Undo `set_checkpointing`."""
    names = ("disable_gradient_checkpointing", "activation_checkpointing_disable", "gradient_checkpointing_disable")
    next(getattr(model, name) for name in names if hasattr(model, name))()


def _optimizer(training: DreamBoothTraining) -> Any:
    if training.optimizer in _KNOWN and not training.optimizer_options:
        return training.optimizer
    return lambda parameters: make_optimizer(training, parameters, **training.optimizer_options)


def _tokens(family: Family, encoder: str) -> int:
    tokenizer = getattr(family.pipe, encoder.replace("text_encoder", "tokenizer"))
    return int(tokenizer.model_max_length)


def _stored(model: nn.Module) -> int:
    tensors: Mapping[int, torch.Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
