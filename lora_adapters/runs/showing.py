"""Shows and records the steps of a training loop, whoever's loop it is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from . import measured
from .runner import Run


class Rates:
    """Counts what a loop works through, such as rows and tokens, and says how much that is per second.

    Args:
        names: what is counted; progress shows the first.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self.start()

    def start(self) -> None:
        """Begin anew, from now."""
        self._counts = dict.fromkeys(self._names, 0)
        self._began = time.monotonic()

    def add(self, **counts: int) -> None:
        """Count some more."""
        for name, count in counts.items():
            self._counts[name] += count

    def read(self) -> dict[str, float]:
        """Return name -> number per second since the start."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        return {name: count / seconds for name, count in self._counts.items()}


class Steps:
    """The steps of one run, as progress and metrics.jsonl show them.

    Args:
        run: the run.
        device: where the model is.
        rates: what the loop counts.
    """

    def __init__(self, run: Run, device: torch.device, rates: Rates) -> None:
        self.run, self.device, self.rates = run, device, rates
        self._last: dict[str, float] = {}

    def begin(self, done: int, total: int) -> None:
        """Begin to show, and to count, a loop of `total` steps of which `done` were done before."""
        self.run.facts.total_steps = total
        self.run.progress.start("training", total, done)
        self.rates.start()

    def done(self, step: int, epochs: float) -> None:
        """Show that `step` steps, and so many passes over the data, are done."""
        self.run.facts.steps, self.run.facts.epochs = step, epochs
        name, rate = next(iter(self.rates.read().items()))
        self.run.progress.update(step, memory=measured.now(self.device), rates={name: rate}, **self._last)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl.

        Args:
            step: steps that are done.
            values: "epoch", and "loss", "learning_rate", "grad_norm", "adapter_norm", which the report draws, or "eval_..."
                metrics. To a line with a loss the rates and the memory in use are added.
        """
        row = {"step": step, **values}
        if "loss" in values:
            self._last = {"loss": float(values["loss"])}
            row |= {f"{name}_per_second": rate for name, rate in self.rates.read().items()}
            row["memory"] = measured.now(self.device)
        self.run.folder.append(row)
