"""What is kept of a training run, and what the user is told if it ends early."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..adapter_config import CONFIG_NAME, DIFFUSERS_NAME, WEIGHTS_NAME
from ..staging import new_folder
from . import checkpoints
from .gradients import GradientGuard
from .runner import DivergedError, Run

#: Files of an adapter, whichever of them it has.
_FILES = (CONFIG_NAME, WEIGHTS_NAME, DIFFUSERS_NAME)


class Kept(Protocol):
    """What is kept: an `Adapter`, or several that belong together."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over what is trained."""
        ...

    def save(self, path: Path) -> Any:
        """Write the adapter to a folder."""
        ...


def keep_checkpoint(run: Run, folder: Path) -> None:
    """Declare a checkpoint whole, and let go of older ones.

    Args:
        folder: run.folder.checkpoints / "checkpoint-STEP", with everything in it.
    """
    checkpoints.complete(folder)
    checkpoints.prune(folder.parent, run.recipe.training.keep_checkpoints)
    run.folder.write_facts(run.facts)


def save_adapter(run: Run, adapter: Kept, guard: GradientGuard) -> bool:
    """Save the adapter if its values are finite, else the newest checkpoint's; return False if there is none.

    The run has diverged where a checkpoint's takes its place, which the guard is told.
    """
    folder = run.folder.adapter
    if guard.holds(adapter.parameters(), run.facts.steps):
        adapter.save(folder)
    elif (last := checkpoints.newest(run.folder.checkpoints)) is not None:
        with new_folder(folder, replace=True) as stage:
            for name in _FILES:
                if (last / name).is_file():
                    shutil.copyfile(last / name, stage / name)
    else:
        return False
    run.facts.adapter_bytes = sum((folder / name).stat().st_size for name in _FILES if (folder / name).is_file())
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
