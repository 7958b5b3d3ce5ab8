"""What is kept of a training run, and what the user is told if it ends early."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..api import restore
from . import checkpoints
from .gradients import GradientGuard
from .runner import DivergedError, Run

if TYPE_CHECKING:
    from ..adapter import Adapter


def keep_checkpoint(run: Run, folder: Path) -> None:
    """Declare a checkpoint whole, and let go of older ones.

    Args:
        folder: run.folder.checkpoints / "checkpoint-STEP", with everything in it.
    """
    checkpoints.complete(folder)
    checkpoints.prune(folder.parent, run.recipe.training.keep_checkpoints)
    run.folder.write_facts(run.facts)


def save_adapter(run: Run, adapter: Adapter, guard: GradientGuard) -> bool:
    """Save the adapter if its values are finite, else the newest checkpoint's; return False if there is none.

    The adapter is detached where a checkpoint's takes its place: the run has diverged then, which the guard is told.
    """
    if guard.holds(adapter.parameters(), run.facts.steps):
        adapter.save(run.folder.adapter)
    elif (last := checkpoints.newest(run.folder.checkpoints)) is not None:
        restore(adapter.detach(), last).save(run.folder.adapter)
    else:
        return False
    run.facts.adapter_bytes = sum(p.stat().st_size for p in run.folder.adapter.glob("adapter_*"))
    return True


def raise_unless_finished(run: Run, guard: GradientGuard) -> None:
    """Raise if training ended before its last step. What is worth keeping is saved by then.

    Raises:
        InterruptedRunError: the user asked for it, and the last step's checkpoint is there.
        DivergedError: the guard stopped it.
    """
    facts = run.facts
    if run.stop.requested is not None and not guard.diverged:
        saved = f"Step {facts.steps} of {facts.total_steps} and the adapter are saved in {run.folder.path}"
        raise run.stop.error(f"{saved}; the same command with resume=true goes on.")
    if guard.diverged:
        kept = f"the adapter from before is in {run.folder.adapter}" if run.folder.adapter.exists() else "none is kept"
        raise DivergedError(
            f"{guard.diverged} Training stopped at step {facts.steps}; {kept}. Try a lower training.learning_rate."
        )
