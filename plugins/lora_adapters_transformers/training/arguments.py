"""A recipe's `training:` as transformers' TrainingArguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lora_adapters.recipes.sections import TrainingSection
from lora_adapters.runs.requirements import compute_dtype
from lora_adapters.runs.schedule import save_every, steps_in_all

_OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "sgd": "sgd", "adafactor": "adafactor"}


def training_arguments(
    training: TrainingSection, folder: Path, rows: int, evaluates: bool, device: torch.device
) -> dict[str, Any]:
    """Return the keyword arguments of TrainingArguments (or a class derived from it).

    Args:
        training: the recipe's.
        folder: where checkpoints go.
        rows: rows of the training data.
        evaluates: there is eval data.
        device: where the model is.
    """
    dtype = compute_dtype(training, device)
    total = steps_in_all(training, rows)
    return {
        "output_dir": str(folder),
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule if training.schedule != "constant" else "constant_with_warmup",
        # Trainer rounds a share up, and a warm-up's first step has a rate of 0: a run of one step would learn nothing.
        "warmup_steps": int(training.warmup if training.warmup >= 1 else training.warmup * total),
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": _OPTIMIZERS[training.optimizer],
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "gradient_checkpointing": training.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if training.gradient_checkpointing else None,
        "seed": training.seed,
        "torch_compile": training.compile,
        "logging_strategy": "steps",
        "logging_steps": training.log_every,
        "logging_first_step": True,
        # A loss that is not finite must be seen; a skipped step's is left out of the mean.
        "logging_nan_inf_filter": training.nan == "skip",
        "save_strategy": "steps",
        "save_steps": save_every(training, total),
        "save_total_limit": None,  # lora_adapters.runs.checkpoints prunes, once the new one is whole
        "eval_strategy": "steps" if training.eval_every and evaluates else "no",
        "eval_steps": training.eval_every,
        "report_to": training.report_to,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": device.type == "cpu",
    }
