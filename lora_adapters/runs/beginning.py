"""What a task records, and tells, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from ..budget import format_shape, format_size
from ..errors import RequestError, UnsupportedError
from ..free_memory import free_memory
from ..inject import routes
from ..report.facts import DataFacts
from ..report.plan_groups import adapted, skipped
from ..report.route_table import as_words
from .runner import Run, Runner

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..attach_plan import AttachPlan


def record_data(run: Run, parts: Sequence[DataFacts]) -> None:
    """Record and tell the data.

    Raises:
        RequestError: the run is resumed, and began with other data.
    """
    facts = run.facts
    if run.resume_from is not None and facts.data and facts.data != list(parts):
        raise RequestError(
            "resume=true, but the data is not what the run began with: a resumed run must go on as it began. Put the "
            "files back, or give another output."
        )
    facts.data = list(parts)
    for part in parts:
        details = "".join(_detail(*item) for item in part.details.items())
        run.progress.say(f"{part.name}: {part.rows:,} rows of {part.source}{details}")


def record_memory(run: Run, runner: Runner, plan: AttachPlan, device: torch.device) -> None:
    """Record what a step will take by the plan, and tell it beside what is free; a note where it can't be predicted."""
    rows, length = runner.shape()
    try:
        step = runner.memory(plan, rows, length, run.recipe.training.gradient_checkpointing)
    except UnsupportedError as error:
        run.facts.notes.append(f"A step's memory was not predicted: {error}")
        return
    run.facts.memory_planned = asdict(step)
    free = free_memory(str(device))
    warning = ": it may not fit (lora-adapters plan says what would)" if step.total > free else ""
    run.progress.say(
        f"a step of {format_shape(rows, length)} takes {format_size(step.total)} by the plan; {format_size(free)} are free "
        f"on {device}{warning}"
    )


def record_adapter(run: Run, adapter: Adapter) -> None:
    """Record and tell what was adapted, what was not, and what is trained."""
    plan, facts = adapter.plan, run.facts
    ways = {name: as_words(route) for name, route in routes(adapter.base, plan).items()}
    facts.adapted, facts.skipped = adapted(plan, ways), skipped(plan)
    facts.trained = list(plan.trained)
    facts.notes += [note for note in plan.notes if note not in facts.notes]
    facts.trainable_parameters, facts.total_parameters = plan.trainable_parameters, plan.total_parameters
    run.progress.say(f"adapting {len(plan.layers)} layers: {facts.trainable_parameters:,} values to train")


def _detail(name: str, value: Any) -> str:
    return f", {value:,} {name}" if isinstance(value, int) else f", {name}: {value}"
