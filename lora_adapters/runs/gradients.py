"""Looks at gradients before they change a weight, and at weights before they are saved, as `training.nan` says."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .runner import DivergedError, Run

#: With `nan: skip`, and where float16's loss scaling skips steps by itself: so many in a row, and the run has diverged.
_SKIPPED_IN_A_ROW = 25


class GradientGuard:
    """The NaN policy of one run.

    Attributes:
        diverged: why training has to stop after this step; "" while it goes on.
    """

    def __init__(self, run: Run) -> None:
        self.diverged = ""
        self._facts, self._policy = run.facts, run.recipe.training.nan
        self._in_a_row = 0

    def passes(
        self,
        parameters: Iterable[torch.nn.Parameter],
        step: int,
        statistics: Iterable[torch.Tensor] = (),
        norm: torch.Tensor | None = None,
    ) -> bool:
        """Return True if the optimizer may use the gradients; else they are dropped, and the step counts as skipped.

        Args:
            parameters: those of the optimizer; more do no harm.
            step: the number of this step, counted from 1.
            statistics: what the forward has changed, as BatchNorm's running statistics: they must be finite too.
            norm: of the gradients, where it is known.

        Raises:
            DivergedError: the gradient is not finite and the policy is "raise".
        """
        parameters = [p for p in parameters if p.grad is not None]
        if norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if bool(norm.isfinite()) and all(bool(value.isfinite().all()) for value in statistics):
            self.taken()
            return True
        what = f"A running statistic of step {step}" if bool(norm.isfinite()) else f"The gradient of step {step}"
        if self._policy == "raise":
            raise DivergedError(f"{what} is not finite (training.nan is raise). Nothing was saved.")
        for parameter in parameters:
            parameter.grad = None  # optimizers pass parameters without a gradient over
        self.skipped(step)
        if self._policy == "stop":
            self.diverged = f"{what} is not finite."
        return False

    def holds(self, parameters: Iterable[torch.nn.Parameter], step: int) -> bool:
        """Return True if the values after step `step` are finite, and may be saved; else training has to stop.

        A step can make them infinite with a finite gradient: ask before each checkpoint, or what is kept is of no use.
        """
        if all(bool(p.isfinite().all()) for p in parameters):
            return True
        self.diverged = self.diverged or f"The adapter's values after step {step} are not finite."
        return False

    def taken(self) -> None:
        """Note a step that was taken. For loops in which a loss scaler looks at the gradients; `passes` calls it itself."""
        self._in_a_row = 0

    def skipped(self, step: int) -> None:
        """Note a step that was skipped, by a loss scaler or here: some are normal, many in a row are not."""
        self._facts.skipped_steps += 1
        self._in_a_row += 1
        if self._in_a_row >= _SKIPPED_IN_A_ROW:
            self.diverged = f"The gradients of the {self._in_a_row} steps up to step {step} are not finite."
