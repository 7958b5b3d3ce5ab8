"""What runners do alike, whatever they train: see `runner.Runner` for what each method is for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..attach_plan import AttachPlan
from ..device import pick_device
from ..errors import RequestError
from ..report.facts import Sample
from .measuring import Measured, record_after, record_before
from .progress import Progress
from .requirements import compute_dtype
from .runner import Run
from .saved import each_model


class RecipeRunner(ABC):
    """A task that is told what to do by a recipe with the usual sections.

    Args:
        recipe: the validated recipe.
    """

    #: What the eval data consists of, in the plural.
    rows: ClassVar[str] = "rows"

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    @cached_property
    def device(self) -> torch.device:
        """Where the model goes."""
        return pick_device(self.recipe.model.device)

    @cached_property
    def autocast(self) -> torch.dtype | None:
        """Dtype of the computation, None for the weights' own."""
        return compute_dtype(self.recipe.training, self.device)

    @cached_property
    def made_plan(self) -> Any:
        """The recipe's plan, on the model without its weights."""
        return self.plan(self.recipe.model.quantization)

    @abstractmethod
    def plan(self, quantization: Any) -> AttachPlan:
        """Return the recipe's plan for a base stored as `quantization` says."""

    @abstractmethod
    def load(self, progress: Progress) -> Any:
        """Return the base on its device, stored as the recipe says; what is random in it is the same every time."""

    def accept(self, adapters: Mapping[str, Path]) -> None:  # noqa: B027 - most tasks leave nothing open
        """Take what the recipe leaves open; see `Runner.accept`."""

    def evaluate(self, adapters: Mapping[str, Path], progress: Progress) -> dict[str, dict[str, float]]:
        """Return name -> metrics on the eval data; see `Runner.evaluate`."""
        found = {}
        for name, model in self.each(adapters, progress):
            progress.say(f"measuring {name} on {self.eval_count:,} {self.rows}")
            found[name] = self.measure_eval(model).metrics
        return found

    def each(self, adapters: Mapping[str, Path], progress: Progress) -> Iterator[tuple[str, Any]]:
        """Yield ("base", model), then (name, the same model with that adapter)."""
        yield from each_model(self.load(progress), adapters)

    @property
    @abstractmethod
    def eval_count(self) -> int:
        """Return the number of eval rows; 0 if there are none."""

    @abstractmethod
    def measure_eval(self, model: Any) -> Measured:
        """Return what is measured of a model, as `each` yields it, on the eval data."""


class RowsRunner(RecipeRunner):
    """A task whose report shows some eval rows with what the base and the adapter make of each."""

    @abstractmethod
    def show_eval(self, model: Any, measured: Measured, count: int) -> list[Sample]:
        """Return some eval rows, always the same; the last part of each is what the model makes of it."""

    def check_eval(self, parts: Sequence[str], place: str) -> None:
        """Raise if a recipe that is only measured by says nothing to measure on.

        Args:
            parts: as for `Runner.check`.
            place: what holds such data, "FILE" or "FOLDER".
        """
        data = self.recipe.data
        if "train" not in parts and data.eval is None and data.eval_split is None and not data.eval_fraction:
            raise RequestError(f"There is no eval data: give --data {place}, or data.eval={place}.")

    def measure_base(self, run: Run, model: Any) -> None:
        """Measure the base, unless there is nothing to measure on or the run that is resumed has done so."""
        if not self.eval_count or run.facts.before:
            return
        run.progress.say(f"measuring the base on {self.eval_count:,} {self.rows}")
        measured = self.measure_eval(model)
        count = min(self.recipe.samples, self.eval_count)
        record_before(run, measured, self.show_eval(model, measured, count))

    def measure_adapter(self, run: Run, model: Any) -> None:
        """Measure the adapted model beside it."""
        if not self.eval_count:
            return
        run.progress.say("measuring the adapter")
        measured = self.measure_eval(model)
        record_after(run, measured, self.show_eval(model, measured, len(run.facts.samples)))
