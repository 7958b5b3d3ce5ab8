"""What was measured of a model, and the base and the adapter side by side in the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..modes import modes_kept
from ..report.facts import Sample, Table
from .runner import Run


@dataclass
class Measured:
    """What was measured.

    Attributes:
        metrics: name -> value.
        tables: more detail, for the report.
        outputs: one text per row, in the rows' order, where the task writes or chooses something.
    """

    metrics: dict[str, float]
    tables: list[Table] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@contextmanager
def evaluating(model: Any, autocast: torch.dtype | None = None) -> Iterator[torch.device]:
    """Within this context the model is in eval mode, without gradients, in the dtype it trains in."""
    device = next(model.parameters()).device
    precision = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
    with modes_kept(model), torch.no_grad(), precision:
        model.eval()
        yield device


def record_before(run: Run, measured: Measured, samples: Sequence[Sample]) -> None:
    """Record what the base does, and keep it: a resumed run need not measure it again.

    Args:
        measured: of the base, on the eval data.
        samples: what to show; the last part of each is what the base makes of it.
    """
    run.facts.before, run.facts.samples = measured.metrics, list(samples)
    for sample in run.facts.samples:
        label, text = sample.parts[-1]
        sample.parts[-1] = (f"{label}, base", text)
    run.folder.write_facts(run.facts)


def record_after(run: Run, measured: Measured, samples: Sequence[Sample]) -> None:
    """Record what the adapter does.

    Args:
        measured: of the adapted model, on the eval data.
        samples: as for `record_before`, in the same order, with what the adapted model makes of each.
    """
    run.facts.after, run.facts.tables = measured.metrics, measured.tables
    for sample, after in zip(run.facts.samples, samples, strict=True):
        label, text = after.parts[-1]
        sample.parts = [*sample.parts[: len(after.parts)], (f"{label}, adapter", text)]
