"""The folder of a run, and what lies where in it.

adapter/         the adapter, a PEFT checkpoint, with its model card
recipe.yaml      the resolved recipe: every default written out
metrics.jsonl    one line per logged step
facts.json       all that is known of the run (`RunFacts`)
environment.json versions and devices
report.html      the same to read
checkpoints/     what a resumed run goes on from
samples/         images that were made while training
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RequestError, StateError
from ..report.facts import RunFacts
from . import checkpoints

try:
    import fcntl
except ImportError:  # Windows has no flock; there two runs in one folder are not noticed.
    fcntl = None

#: Files and folders of a run. A folder that holds anything else is no run's folder and is left alone.
ADAPTER, RECIPE, METRICS, FACTS = "adapter", "recipe.yaml", "metrics.jsonl", "facts.json"
ENVIRONMENT, REPORT, CHECKPOINTS = "environment.json", "report.html", "checkpoints"
#: What TensorBoard and W&B write; images that were made while training.
LOGS, SAMPLES = "logs", "samples"
#: Written and removed, to see whether the folder can be written to.
_TRIAL = ".facts.json.trial"
_OURS = {ADAPTER, RECIPE, METRICS, FACTS, ENVIRONMENT, REPORT, CHECKPOINTS, LOGS, SAMPLES}


class RunFolder:
    """Paths and files of one run.

    Args:
        path: the folder; nothing is made or read yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.adapter = self.path / ADAPTER
        self.checkpoints = self.path / CHECKPOINTS

    # ---- before a run ------------------------------------------------------------------------------------------------

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Check that a run may begin here. Changes nothing.

        Raises:
            RequestError: the folder is a file, holds other things, or a run that is neither resumed nor overwritten; or
                there is no run to resume.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise RequestError(f"output {self.path} is a file: give another folder.")
            found = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        if found and FACTS not in found:
            raise RequestError(f"output {self.path} holds other files and no run: give a new folder.")
        if foreign := sorted(name for name in found - _OURS if not _is_litter(name)):
            raise RequestError(
                f"output {self.path} also holds {foreign[0]!r}, which no run wrote: move it, then try again."
            )
        if resume:
            if FACTS not in found:
                raise RequestError(f"resume=true, but there is no run in {self.path}: leave resume out to begin one.")
            if self.facts().status == "finished":
                raise RequestError(f"The run in {self.path} is finished: there is nothing to resume.")
        elif not overwrite and self._worth_keeping():
            raise RequestError(
                f"output {self.path} holds a run already: set resume=true to go on with it, overwrite=true to replace it, "
                "or give another folder."
            )

    def _worth_keeping(self) -> bool:
        """Return True unless the run that was here ended before it had trained anything."""
        return self.adapter.exists() or bool(checkpoints.checkpoints(self.checkpoints))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder, which is made if missing.

        Raises:
            RequestError: the folder can't be made or written to.
            StateError: another process is running here.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / _TRIAL).touch()
            (self.path / _TRIAL).unlink(missing_ok=True)  # another run may just have removed it
            handle = os.open(self.path, os.O_RDONLY) if fcntl is not None else None
        except OSError as error:
            raise _unwritable(self.path, error) from error
        if fcntl is None or handle is None:
            yield
            return
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StateError(
                    f"Another run is at work in {self.path}: wait for it, or give another folder."
                ) from None
            yield
        finally:
            os.close(handle)

    def clear(self) -> None:
        """Remove an earlier run's files."""
        import shutil

        for path in sorted(self.path.iterdir()):
            if path.name in _OURS or _is_litter(path.name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    # ---- files -------------------------------------------------------------------------------------------------------

    def facts(self) -> RunFacts:
        """Return the facts that were written last."""
        try:
            return RunFacts.read(self.path / FACTS)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{self.path / FACTS} can't be read ({error}): the run in {self.path} is damaged."
            ) from error

    def write_facts(self, facts: RunFacts) -> None:
        """Write facts.json and environment.json."""
        write_text(self.path / FACTS, json.dumps(finite(facts.as_dict()), indent=2, ensure_ascii=False))
        write_text(self.path / ENVIRONMENT, json.dumps(facts.environment, indent=2, ensure_ascii=False))

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.path / METRICS, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(finite(dict(row)), ensure_ascii=False) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl. A last line that a killed run left half written is dropped."""
        try:
            text = (self.path / METRICS).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        rows: list[dict[str, Any]] = []
        lines = text.removesuffix("\n").split("\n")  # not splitlines: a text may hold what Unicode takes for its end
        for number, line in enumerate(lines, 1):
            try:
                rows.append({key: _number(value) for key, value in json.loads(line).items()})
            except (ValueError, AttributeError):
                if number == len(lines) and not text.endswith("\n"):
                    break
                raise CheckpointError(
                    f"{self.path / METRICS} is damaged: line {number} is no JSON object. Mend or remove that line."
                ) from None
        return rows

    def rewind(self, step: int) -> None:
        """Drop the lines of metrics.jsonl that lie after `step`: a resumed run writes them again."""
        kept = [row for row in self.history() if row.get("step", 0) <= step]
        write_text(self.path / METRICS, "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in kept))


def _is_litter(name: str) -> bool:
    """Return True for what a run leaves that was killed while it wrote one of its files."""
    return name.startswith(".") and any(name[1:].startswith(f"{ours}.") for ours in _OURS)


def _unwritable(path: Path, error: OSError) -> RequestError:
    return RequestError(f"output {path} can't be written: {error.strerror or error}. Give another folder.")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8", errors="backslashreplace")  # data may hold half a surrogate pair
    os.replace(beside, path)


def finite(value: Any) -> Any:
    """Return plain data whose numbers that are not finite are the texts "nan", "inf", "-inf", which JSON can hold."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    """Undo `finite`."""
    return float(value) if value in ("nan", "inf", "-inf") else value
