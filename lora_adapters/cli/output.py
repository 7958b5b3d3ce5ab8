"""What every command prints: facts as tables or as JSON on stdout, progress on stderr, nothing of it when quiet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Output:
    """How a command prints; see `output_options`.

    Attributes:
        as_json: stdout holds one JSON document and nothing else.
        quiet: no progress, and no tables where the exit status says it all.
    """

    as_json: bool
    quiet: bool

    def say(self, line: str) -> None:
        """Tell how far the work is, on stderr."""
        if not (self.quiet or self.as_json):
            click.echo(line, err=True)

    def show(self, facts: Any, render: Callable[[], None]) -> None:
        """Print `facts` as JSON if that was asked for, else call `render`, which prints the same for people."""
        if self.as_json:
            click.echo(json.dumps(facts, indent=2, default=str))
        elif not self.quiet:
            render()


def output_options(command: _Command) -> _Command:
    """Give a command --json and --quiet, with an `output` argument that holds both, and --traceback (see `main`)."""

    def wrapped(*args: Any, as_json: bool, quiet: bool, **kwargs: Any) -> Any:
        return command(*args, output=Output(as_json, quiet), **kwargs)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--traceback", is_flag=True, expose_value=False, help="Show the whole traceback of an error."),
        click.option("--quiet", "-q", is_flag=True, help="Print no progress and no tables; the exit status tells."),
        click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON."),
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


def print_table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), title: str = "") -> None:
    """Print a table as wide as the terminal; in a pipe, wide enough that nothing is cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if title:
        click.echo(title)
    table = Table(box=box.SIMPLE_HEAD, show_header=bool(header))
    for column in header or [""] * max((len(row) for row in rows), default=0):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    console.print(table) if console.is_terminal else Console(width=200, markup=False, highlight=False).print(table)


def print_facts(facts: Mapping[str, Any], title: str = "") -> None:
    """Print name -> value as a table of two columns."""
    print_table([(name, str(value)) for name, value in facts.items()], title=title)
