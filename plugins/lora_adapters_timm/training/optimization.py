"""timm's optimizers and schedules, as a recipe's `training:` means them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from lora_adapters.error_text import did_you_mean
from lora_adapters.errors import RequestError

if TYPE_CHECKING:
    from ..recipes import ImageTraining

#: The recipe's name -> timm's, where they differ.
_NAMES = {"adamw_8bit": "bnbadamw8bit"}
#: Optimizers whose memory `lora_adapters.memory` knows by name; of timm's sgd it is another, which has a momentum.
_KNOWN = ("adamw", "adamw_8bit")


def make_optimizer(training: ImageTraining, parameters: nn.Module | Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the recipe's optimizer.

    Args:
        training: the recipe's section.
        parameters: the adapted base, whose group_matcher gives the layers of layer_decay and whose biases and norms get no
            weight decay; or bare parameters.

    Raises:
        RequestError: timm has no such optimizer, or it does not take an option.
    """
    layered = {"layer_decay": training.layer_decay} if isinstance(parameters, nn.Module) else {}
    try:
        return create_optimizer_v2(
            parameters,
            opt=_NAMES.get(training.optimizer, training.optimizer),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            **layered,
            **training.optimizer_options,
        )
    except (TypeError, ValueError, KeyError) as error:
        names = [*list_optimizers(), *_NAMES]
        if training.optimizer in names:
            raise RequestError(
                f"training.optimizer_options: {training.optimizer} does not take them: {error}"
            ) from error
        hint = did_you_mean(training.optimizer, names)
        raise RequestError(f"training.optimizer: timm has no {training.optimizer!r}.{hint}") from error


def memory_of(training: ImageTraining) -> Any:
    """Return the optimizer as `lora_adapters.memory.predict_step` takes it."""
    if training.optimizer in _KNOWN and not training.optimizer_options:
        return training.optimizer
    return lambda parameters: make_optimizer(training, parameters)


def make_schedule(training: ImageTraining, optimizer: torch.optim.Optimizer, total: int, per_epoch: int) -> Any:
    """Return timm's scheduler; `step_update(n)` sets the learning rates of the step after n steps.

    Linear, cosine and constant give the shares of `lora_adapters.runs.schedule.learning_rate_share`.

    Args:
        total: steps of the run.
        per_epoch: steps of one pass over the data.
    """
    warmup = math.ceil(total * training.warmup) if training.warmup < 1 else int(training.warmup)
    names = {"linear": "poly", "constant": "step"}
    powers = {"linear": 1.0, "constant": 1.0}  # decay_rate is poly's power, and what "step" multiplies by
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=names.get(training.schedule, training.schedule),
        num_epochs=max(1, total - warmup),
        step_on_epochs=False,
        updates_per_epoch=1,  # everything in steps
        warmup_epochs=warmup,
        warmup_lr=0.0,
        warmup_prefix=True,
        min_lr=training.min_learning_rate,
        decay_epochs=max(1, round(training.decay_epochs * per_epoch)),
        decay_milestones=[max(1, round(epoch * per_epoch)) for epoch in training.decay_milestones],
        decay_rate=powers.get(training.schedule, training.decay_rate),
    )
    return scheduler
