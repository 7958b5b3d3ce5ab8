"""What a recipe's `training:` needs of this machine: a dtype to compute in, and packages."""

from __future__ import annotations

import torch

from ..errors import RequestError
from ..hooks.manager import require
from ..recipes.sections import TrainingSection

#: Where to report -> the package it needs.
_REPORTERS = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_training(training: TrainingSection) -> None:
    """Raise if a package that the recipe asks for is missing."""
    for name in training.report_to:
        require((_REPORTERS[name],), "", f"training.report_to: {name}")
    if training.optimizer == "adamw_8bit":
        require(("bitsandbytes",), "bnb", "training.optimizer: adamw_8bit")


def compute_dtype(training: TrainingSection, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast, or None to compute in the weights' own.

    Raises:
        RequestError: the device can't.
    """
    if training.precision == "float32":
        return None
    if training.precision == "auto":
        if device.type != "cuda":
            return None
        # Planning for a GPU that is not here: today's have it.
        native = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if training.precision == "float16" and device.type == "cpu":
        raise RequestError("training.precision: float16 needs a GPU; on a CPU take bfloat16, float32 or auto.")
    return getattr(torch, training.precision)
