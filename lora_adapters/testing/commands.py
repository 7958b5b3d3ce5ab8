"""Runs `lora-adapters` as users do, each command in a process of its own, many of them quickly."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Imported once, by the process that commands are forked from; a missing one is no error there.
_PRELOADED = [
    "torch",
    "peft",
    "pydantic",
    "lora_adapters.cli",
    "lora_adapters.runs.run",
    "datasets",
    "accelerate",
    "timm.data",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
]


@dataclass(frozen=True)
class Done:
    """What a command did.

    Attributes:
        status: exit status; minus the signal's number if a signal killed it.
        stdout, stderr: what it printed.
    """

    status: int
    stdout: str
    stderr: str


def run_command(*arguments: str, signal_at: tuple[int, int] | None = None) -> Done:
    """Run `lora-adapters` with these arguments, in a new process with this one's environment.

    Where the system can fork safely, the process comes with the libraries imported, which is what takes long.

    Args:
        arguments: what stands after the command's name.
        signal_at: (signal, step): the process sends itself the signal once that step is in metrics.jsonl.
    """
    linux = sys.platform == "linux"
    context: Any = multiprocessing.get_context("forkserver" if linux else "spawn")
    if linux:
        context.set_forkserver_preload(_PRELOADED)  # nothing happens if the server runs already
    with tempfile.TemporaryDirectory() as folder:
        given = (arguments, dict(os.environ), os.getcwd(), folder, signal_at)
        process = context.Process(target=_main, args=given)
        process.start()
        process.join()
        texts = [(Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return Done(process.exitcode, *texts)


def _main(
    arguments: Sequence[str], environment: dict[str, str], here: str, folder: str, signal_at: tuple[int, int] | None
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # A started Python would have read these.
    sys.path[:0] = [
        path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path
    ]
    os.chdir(here)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", line_buffering=True)  # type: ignore[union-attr]
    sys.argv = ["lora-adapters", *arguments]
    if signal_at is not None:
        _send(*signal_at)
    from ..cli import main

    main()


def _send(number: int, at: int) -> None:
    """Send this process a signal when a step's line was appended: no clock decides which step it meets."""
    from ..runs.folder import RunFolder

    append = RunFolder.append

    def then_signal(self: RunFolder, row: Any) -> None:
        append(self, row)
        with suppress(TypeError, ValueError):
            if int(row.get("step", 0)) == at and "loss" in row:
                os.kill(os.getpid(), number)

    RunFolder.append = then_signal  # type: ignore[method-assign]
