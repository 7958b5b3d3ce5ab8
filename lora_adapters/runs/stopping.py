"""Ctrl-C and SIGTERM: the first one asks the run to save and end, the second one ends it at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..errors import LoraAdaptersError

_ASKING = (signal.SIGINT, signal.SIGTERM)


def leave_signals(worker: int = 0) -> None:
    """In a worker process that reads data: Ctrl-C reaches the whole group, and only the process that trains answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class InterruptedRunError(LoraAdaptersError):
    """A signal ended the run, after everything worth keeping was saved.

    Attributes:
        exit_status: 128 + the signal's number, as shells report it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


class StopSignal:
    """Within this context a first SIGINT or SIGTERM is noted, and a second one raises KeyboardInterrupt.

    Attributes:
        requested: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._at_once = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals.
            self._previous = {number: signal.signal(number, self._asked) for number in _ASKING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self, what: str) -> Iterator[None]:
        """Within this context the first signal ends the work at once: for long stages in which there is nothing to save.

        Args:
            what: what then has become of the run, such as "Nothing was trained yet."

        Raises:
            InterruptedRunError: a signal came, now or before.
        """
        self._at_once = True
        try:
            if self.requested is not None:
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt:
            if self.requested is None:
                raise
            raise self.error(what) from None
        finally:
            self._at_once = False

    def error(self, what: str) -> InterruptedRunError:
        """Return the error that says which signal came, and `what` became of the run."""
        assert self.requested is not None
        return InterruptedRunError(f"Stopped by {self.requested.name}. {what}", self.requested)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
        if self._at_once:  # as KeyboardInterrupt: no library's `except Exception` keeps it
            raise KeyboardInterrupt
        print("Stopping after this step, and saving; once more stops at once.", file=sys.stderr, flush=True)
