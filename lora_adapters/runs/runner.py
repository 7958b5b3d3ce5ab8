"""What a task must offer to `lora-adapters train`, `plan`, `eval` and `generate`, and what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import LoraAdaptersError
from ..hooks.manager import load_object, plugins
from ..report.facts import RunFacts, Sample
from .folder import RunFolder
from .progress import Progress
from .stopping import StopSignal

if TYPE_CHECKING:
    from ..attach_plan import AttachPlan
    from ..memory import StepMemory
    from ..recipes.sections import Recipe


class DivergedError(LoraAdaptersError):
    """A gradient was not finite, and the recipe's NaN policy ended the run."""


@dataclass
class Run:
    """One run, as a task sees it.

    Attributes:
        recipe: the validated recipe.
        folder: where everything goes.
        facts: what becomes the report; a task fills in what it knows, as it goes.
        progress: tells how far the work is.
        stop: whether the user asked the run to end.
        resume_from: the checkpoint to go on from, or None.
    """

    recipe: Recipe
    folder: RunFolder
    facts: RunFacts
    progress: Progress
    stop: StopSignal = field(default_factory=StopSignal)
    resume_from: Path | None = None

    def preparing(self) -> AbstractContextManager[None]:
        """Within this context, before the first step, a signal ends the run at once: there is nothing to save."""
        return self.stop.at_once("Nothing was trained yet.")

    def measuring(self) -> AbstractContextManager[None]:
        """Within this context, after the last step, a signal ends the run at once: everything is saved."""
        return self.stop.at_once(f"The adapter is trained and saved in {self.folder.adapter}; resume=true measures it.")


def runner_for(recipe: Recipe) -> Runner:
    """Return the runner of a validated recipe's task."""
    return load_object(plugins().trainers()[recipe.task].target)(recipe)


class Runner(Protocol):
    """One task. Its class is the target of a `TrainerSpec`; it is made with the validated recipe.

    The order of calls: `check`, then `plan` and `memory` or `train`; or `accept`, `check` and `evaluate`; or `accept` and
    `generate`.
    """

    def __init__(self, recipe: Any) -> None: ...

    def check(self, parts: Sequence[str] = ("train", "eval")) -> None:
        """Find what is wrong before a weight is loaded or a folder made: data, columns, the model's name.

        Args:
            parts: which parts of the data are needed.

        Raises:
            LoraAdaptersError: one line that says what to do.
        """
        ...

    def accept(self, adapters: Mapping[str, Path]) -> None:
        """Take from saved adapters what the recipe leaves open, such as a classifier's labels. No weight is loaded.

        Args:
            adapters: name -> folder; each holds an adapter for the recipe's base.

        Raises:
            RequestError: they can't be used by one recipe, such as classifiers with other labels.
        """
        ...

    def shape(self) -> tuple[int, int]:
        """Return rows and tokens per row of one forward pass in training; a task without tokens returns (rows, 1)."""
        ...

    def plan(self, quantization: Any) -> AttachPlan:
        """Return the recipe's plan, on a model without weights, with the base stored as `quantization` says."""
        ...

    def memory(
        self, plan: AttachPlan, batch_size: int, length: int, checkpointing: bool, device: str | None = None
    ) -> StepMemory:
        """Predict a training step of that plan as the recipe computes it, on a kind of device that need not be here.

        Args:
            device: "cuda", "cpu", ...; None means the recipe's.
        """
        ...

    def train(self, run: Run) -> None:
        """Train, and leave the adapter in `run.folder.adapter` and what is known in `run.facts`.

        Raises:
            InterruptedRunError: `run.stop` asked for it; a checkpoint and the adapter were saved.
            DivergedError: a gradient was not finite.
        """
        ...

    def evaluate(self, adapters: Mapping[str, Path], progress: Progress) -> dict[str, dict[str, float]]:
        """Return name -> metrics on the recipe's eval data: of the base under the name "base", and of each adapter."""
        ...

    def generate(
        self, adapters: Mapping[str, Path], prompts: Sequence[str], progress: Progress, **options: Any
    ) -> list[Sample]:
        """Return one Sample per prompt: what the base answers, and each adapter."""
        ...
