"""What the shell completes besides commands and options. A failure completes nothing and says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem


def _complete(known: Callable[[], Iterable[tuple[str, str]]]) -> Callable[..., list[CompletionItem]]:
    def complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            return [CompletionItem(name, help=line) for name, line in known() if name.startswith(incomplete)]
        except Exception:  # the shell shows a traceback in the middle of the line being typed
            return []

    return complete


def _starters() -> list[tuple[str, str]]:
    from ..recipes.starters import starters

    return [(name, starter.summary) for name, starter in starters().items()]


def _tasks() -> list[tuple[str, str]]:
    from ..hooks.manager import plugins

    return [(name, spec.summary) for name, spec in plugins().trainers().items()]


recipe_names: Any = _complete(_starters)
task_names: Any = _complete(_tasks)
