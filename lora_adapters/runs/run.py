"""Carries one run out: checks first, then a folder that is right whatever ends the run."""

from __future__ import annotations

import datetime
import errno
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import LoraAdaptersError, RequestError, StateError, UnsupportedError
from ..recipes.reading import dump, read_recipe
from ..report.facts import RunFacts
from .checkpoints import newest, step_of
from .environment import environment
from .folder import RECIPE, REPORT, RunFolder, write_text
from .out_of_memory import explain, is_out_of_memory
from .processes import count, rank
from .progress import Progress
from .runner import DivergedError, Run, Runner
from .stopping import InterruptedRunError

if TYPE_CHECKING:
    from ..recipes.sections import Recipe

#: What a disk says that is full, read-only or broken.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}

#: Keys that a resumed run may change: they alter what is kept and told, not what is computed.
_FREE_TO_CHANGE = {
    "resume",
    "overwrite",
    "output",
    "samples",
    "training.log_every",
    "training.save_every",
    "training.keep_checkpoints",
    "training.report_to",
    "training.nan",
}


def train(
    recipe: Recipe, runner: Runner, progress: Progress, on_end: Callable[[RunFacts], None] = lambda facts: None
) -> RunFacts:
    """Run a recipe.

    Args:
        recipe: validated.
        runner: the task's runner, made with `recipe`. Its attribute `several_processes`, if true, says that a launcher
            may start it several times; the main process alone writes the run's folder.
        progress: shows how far it is.
        on_end: called with the facts of a run that began, however it ended.

    Returns:
        The facts, as they were written to the run's folder.

    Raises:
        InterruptedRunError, DivergedError, DoesNotFitError, other LoraAdaptersErrors: why the run ended. Where there is
            something to keep, the folder holds it and a report.
    """
    if count() > 1 and not getattr(runner, "several_processes", False):
        raise UnsupportedError(f"{recipe.task} trains in one process, on one device: start it without a launcher.")
    if rank() > 0:
        return _help(recipe, runner)
    folder = RunFolder(recipe.output)
    folder.check(resume=recipe.resume, overwrite=recipe.overwrite)
    runner.check()  # which also writes into the recipe what it finds in the data, such as a classifier's labels
    if recipe.resume:
        _check_unchanged(recipe, folder)
    with folder.locked(), _disk_errors(folder):
        run = _begin(recipe, folder, progress)
        try:
            with _recorded(run, runner), run.stop:
                runner.train(run)
        finally:
            on_end(run.facts)
    return run.facts


def _help(recipe: Recipe, runner: Runner) -> RunFacts:
    """Run a recipe in a process beside the main one: what it writes goes when it ends. See `train`."""
    runner.check()
    with tempfile.TemporaryDirectory() as scratch:
        facts = RunFacts(recipe.task, recipe.model.name, recipe.model.revision)
        # The main process writes no checkpoint before the first step, which takes this one too.
        checkpoint = newest(RunFolder(recipe.output).checkpoints) if recipe.resume else None
        run = Run(recipe, RunFolder(scratch), facts, Progress(quiet=True), resume_from=checkpoint)
        with run.stop:
            runner.train(run)
    return facts


@contextmanager
def _disk_errors(folder: RunFolder) -> Iterator[None]:
    """Turn a full or failing disk into one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.errno in _DISK else None
        if reason is None and "PytorchStreamWriter" in str(error):  # how torch.save says it
            reason = "torch.save failed, as on a full disk"
        if reason is None or isinstance(error, LoraAdaptersError):
            raise
        raise StateError(
            f"Writing to {folder.path} failed: {reason}. Make room, then give the same command with resume=true."
        ) from error


def _check_unchanged(recipe: Recipe, folder: RunFolder) -> None:
    """Raise if the recipe would compute something else than the run it resumes."""
    before = _flat(read_recipe(folder.path / RECIPE).model_dump(by_alias=True))
    now = _flat(recipe.model_dump(by_alias=True))
    for key in sorted(before.keys() | now.keys()):
        if key not in _FREE_TO_CHANGE and before.get(key) != now.get(key):
            raise RequestError(
                f"resume=true, but {key} was {before.get(key)!r} in the run in {folder.path} and is {now.get(key)!r} now: a "
                "resumed run must go on as it began. Give the old value, or another output."
            )


def _flat(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in sections.items():
        if isinstance(value, dict) and not prefix:
            found |= _flat(value, f"{key}.")
        else:
            found[prefix + key] = value
    return found


def _begin(recipe: Recipe, folder: RunFolder, progress: Progress) -> Run:
    checkpoint = None
    if recipe.resume:
        facts = folder.facts()
        facts.status, facts.reason = "running", ""
        checkpoint = newest(folder.checkpoints)
        step = step_of(checkpoint) if checkpoint is not None else 0
        folder.rewind(step)
        facts.resumed_from.append(step)
        progress.say(f"resuming at step {step}" if checkpoint else "no complete checkpoint yet: starting at step 0")
    else:
        folder.clear()
        facts = RunFacts(recipe.task, recipe.model.name, recipe.model.revision)
        facts.started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts.recipe = recipe.model_dump(by_alias=True)
    facts.environment = environment()
    write_text(folder.path / RECIPE, dump(recipe))
    folder.write_facts(facts)
    return Run(recipe, folder, facts, progress, resume_from=checkpoint)


@contextmanager
def _recorded(run: Run, runner: Runner) -> Iterator[None]:
    """Write down how the run ended, whatever ends it."""
    from ..device import pick_device
    from ..free_memory import free_memory

    facts, start, earlier = run.facts, time.monotonic(), run.facts.seconds
    device = str(pick_device(run.recipe.model.device))
    free = free_memory(device)
    try:
        yield
        facts.status = "finished"
    except BaseException as error:
        problem: BaseException = error
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold the model, and the explanation needs memory too
            problem = explain(run.recipe, runner, free, device)
        facts.status, facts.reason = _ending(problem)
        if problem is not error:
            raise problem from error
        raise
    finally:
        facts.seconds = earlier + time.monotonic() - start
        run.progress.stop()
        _write(run)


def _ending(error: BaseException) -> tuple[Any, str]:
    if isinstance(error, (InterruptedRunError, KeyboardInterrupt)):
        return "interrupted", str(error) or "Stopped at once."
    if isinstance(error, DivergedError):
        return "diverged", str(error)
    return "failed", str(error) if isinstance(error, LoraAdaptersError) else f"{type(error).__name__}: {error}"


def _write(run: Run) -> None:
    """Write the facts, the report, and the model card beside the adapter."""
    from ..report.card import model_card
    from ..report.html import render_report

    run.folder.write_facts(run.facts)
    write_text(run.folder.path / REPORT, render_report(run.facts, run.folder.history()))
    if run.folder.adapter.is_dir():
        write_text(run.folder.adapter / "README.md", model_card(run.facts))
