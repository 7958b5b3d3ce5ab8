"""Turns a failed allocation into one message: what the step takes, what there was, and settings that would fit."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from ..budget import AS_ASKED, FitSetting, format_shape, format_size, suggest_settings
from ..errors import DoesNotFitError, LoraAdaptersError

if TYPE_CHECKING:
    from ..recipes.sections import Recipe
    from .runner import Runner

#: What the CPU allocators of PyTorch, and libraries under it, say.
_SAID = re.compile(r"can't allocate memory|not enough memory|out of memory|cannot allocate|bad_alloc", re.IGNORECASE)

#: Settings are suggested that take at most this share of what did not fit.
_LESS = 0.85
#: The prediction's error, and what libraries such as cuBLAS allocate for themselves beside tensors.
_ERROR, _LIBRARIES = 0.05, 80 << 20
#: The least that a recipe may say in training.max_length.
_SHORTEST = 8


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocation failed, on any device."""
    if isinstance(error, LoraAdaptersError):
        return False
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None
    )


def explain(recipe: Recipe, runner: Runner, free: int, device: str) -> DoesNotFitError:
    """Return the error that says what would fit.

    Args:
        recipe, runner: what ran.
        free: bytes that could be allocated on `device` before the model was loaded.
        device: where it ran.
    """
    rows, length = runner.shape()
    asked, checkpointing = recipe.model.quantization, recipe.training.gradient_checkpointing
    try:
        made = runner.plan(asked)
        estimate = runner.memory(made, rows, length, checkpointing).total
        # The estimate may have fitted: then only clearly less than it is a way out.
        limit = max(0, min(int(free / (1 + _ERROR)) - _LIBRARIES, int(_LESS * estimate)))
        found = suggest_settings(
            made,
            runner.plan,
            runner.memory,
            limit,
            quantization=asked,
            batch_size=rows,
            sequence_length=length,
            checkpointing=checkpointing,
            shortest=_SHORTEST,
        )
    except LoraAdaptersError as error:
        return DoesNotFitError(
            f"Out of memory on {device}, where {format_size(free)} were free before the model was loaded, and a step's "
            f"memory can't be predicted for this model ({error}). Halve training.batch_size and double "
            "training.gradient_accumulation, set training.gradient_checkpointing=true, or model.quantization=nf4."
        )
    by = " by the plan" if estimate <= free else ""
    step = f"a step of {format_shape(rows, length)} takes {format_size(estimate)}{by}"
    start = f"Out of memory on {device}: {step}, and {format_size(free)} were free before the model was loaded."
    if not found:
        return DoesNotFitError(f"{start} No smaller batch, shorter row or 4-bit base fits: take a smaller model.")
    ways = "; ".join(_way(recipe, setting, rows, length) for setting in found)
    return DoesNotFitError(f"{start} Would fit: {ways}.")


def _way(recipe: Recipe, setting: FitSetting, rows: int, length: int) -> str:
    """Return the overrides that give a setting, ready to paste, and what it takes."""
    overrides: list[str] = []
    if setting.batch_size != rows:
        overrides.append(f"training.batch_size={setting.batch_size}")
        steps = recipe.training.gradient_accumulation * rows // setting.batch_size
        overrides.append(f"training.gradient_accumulation={steps}")
    if setting.sequence_length != length:
        overrides.append(f"training.max_length={setting.sequence_length}")
    if setting.checkpointing and not recipe.training.gradient_checkpointing:
        overrides.append("training.gradient_checkpointing=true")
    if setting.quantization not in (recipe.model.quantization, AS_ASKED):
        overrides.append(f"model.quantization={setting.quantization}")
    return f"{' '.join(overrides)} ({format_size(setting.nbytes)})"
