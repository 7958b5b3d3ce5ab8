"""Which way each adapter layer computes, in groups, as a table of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from io import StringIO
from typing import Protocol

from rich import box
from rich.console import Console
from rich.table import Table

#: The paths, the fast ones first, and what to call them.
PATHS = {
    "merged": "merged",
    "split": "split",
    "beside": "beside",
    "substituted": "substituted",
    "parent": "PEFT's forward",
    "stock": "left to PEFT",
}


_FAST = ("merged", "split", "beside", "substituted")


class ChosenRoute(Protocol):
    """`lora_adapters.layers.routes.Route`, which imports torch."""

    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def reason(self) -> str: ...  # noqa: D102


def as_words(chosen: ChosenRoute) -> str:
    """Return a route as text, with its reason if it is none of the fast ones: "split", "left to PEFT: merged"."""
    return PATHS[chosen.path] + ("" if chosen.path in _FAST else f": {chosen.reason}")


def count_routes(counts: Mapping[str, int]) -> str:
    """Return path -> number of layers as text: "12 split, 4 PEFT's forward"."""
    return ", ".join(f"{counts[path]} {words}" for path, words in PATHS.items() if counts.get(path))


def routes_table(rows: Iterable[tuple[str, str, ChosenRoute]]) -> Table:
    """Return a table of (layer's name, its kind, its route), one row for each route and kind, with a layer as example."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, kind, chosen in rows:
        groups.setdefault((chosen.path, chosen.reason, kind), []).append(name)
    order = list(PATHS)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("path", "layers", "kind", "such as", "why"):
        table.add_column(column, justify="right" if column == "layers" else "left", overflow="fold")
    for (path, reason, kind), names in sorted(groups.items(), key=lambda group: order.index(group[0][0])):
        table.add_row(PATHS[path], str(len(names)), kind, names[0], reason)
    return table


def render_routes(rows: Iterable[tuple[str, str, ChosenRoute]], width: int = 120) -> str:
    """Return `routes_table` as text."""
    console = Console(file=StringIO(), width=width, no_color=True, highlight=False)
    console.print(routes_table(rows))
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
