"""How far a run is: a bar in a terminal, a line now and then in a log, nothing when quiet. All of it on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from ..budget import format_size

#: In a log: at most this many lines of progress for a stretch of work.
_LINES = 20


class Progress:
    """Shows steps, loss, throughput, time left and memory.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._title, self._total, self._first, self._began, self._shown = "", 0, 0, 0.0, 0

    def say(self, line: str) -> None:
        """Print one line."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def start(self, title: str, total: int, done: int = 0) -> None:
        """Begin a stretch of `total` steps, of which `done` were done earlier."""
        self.stop()
        self._title, self._total, self._first, self._began, self._shown = title, total, done, time.monotonic(), 0
        if self.quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[details]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._bar.add_task(title, total=total, completed=done, details="")

    def update(
        self, done: int, *, memory: int | None = None, rates: dict[str, float] | None = None, **values: float
    ) -> None:
        """Show that `done` steps are done; `rates` are per second, such as {"tokens": 1200.0}."""
        if self.quiet:
            return
        details = self.details(done, memory, rates or {}, values)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, details=details)
            return
        line = _LINES * (done - self._first) // max(1, self._total - self._first)
        if line != self._shown or done == self._total:
            self._shown = line
            print(f"{self._title} {done}/{self._total}  {details}", file=sys.stderr, flush=True)

    def details(self, done: int, memory: int | None, rates: dict[str, float], values: dict[str, float]) -> str:
        """Return "loss 1.23 · 1200 tokens/s · 0:12 left · 3.1 GiB"."""
        parts = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items()]
        parts += [f"{rate:,.0f} {name}/s" if rate >= 10 else f"{rate:.2g} {name}/s" for name, rate in rates.items()]
        if done > self._first:
            left = (time.monotonic() - self._began) / (done - self._first) * (self._total - done)
            parts.append(f"{duration(left)} left")
        if memory is not None:
            parts.append(format_size(memory))
        return " · ".join(parts)

    def stop(self) -> None:
        """End the stretch."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """Return "0:07", "12:34" or "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
