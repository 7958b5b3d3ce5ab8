"""A plan or an attached adapter as a table of plain text."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from ..budget import format_size
from .plan_groups import adapted, skipped
from .route_table import PATHS, routes_table

if TYPE_CHECKING:
    from ..attach_plan import AttachPlan
    from .route_table import ChosenRoute


def render(plan: AttachPlan, routes: Mapping[str, ChosenRoute] | None = None, width: int = 120) -> str:
    """Return the plan as text: what is adapted, how it computes if it is attached (`routes`), what is skipped and why."""
    console = Console(file=StringIO(), width=width, no_color=True, highlight=False)
    console.print(_headline(plan), markup=False)
    console.print(_layers_table(plan, routes or {}))
    if routes:
        console.print(routes_table((layer.name, layer.kind, routes[layer.name]) for layer in plan.layers))
    if plan.skipped:
        console.print(_skipped_table(plan))
    if plan.trained:
        console.print(f"Trained and saved whole: {', '.join(plan.trained)}", markup=False)
    for note in plan.notes:
        console.print(f"Note: {note}", markup=False)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _headline(plan: AttachPlan) -> str:
    share = plan.trainable_parameters / max(1, plan.total_parameters + plan.adapter_parameters)
    formats = sorted({*plan.quantize.values()})
    quantized = f"; {len(plan.quantize)} base layers stored as {'/'.join(formats)}" if formats else ""
    return (
        f"Adapter {plan.request.adapter_name!r} on {plan.family} ({plan.backend}): {len(plan.layers)} layers, "
        f"{plan.trainable_parameters:,} trainable of {plan.total_parameters:,} values ({share:.2%}){quantized}"
    )


def _layers_table(plan: AttachPlan, routes: Mapping[str, ChosenRoute]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("role", "layers", "count", "shape", "rank", "scale", "base", "base size", "run by"):
        table.add_column(column, justify="right" if column in ("count", "rank", "scale", "base size") else "left")
    for group in adapted(plan, {name: PATHS[route.path] for name, route in routes.items()}):
        table.add_row(
            group.role,
            group.name,
            str(group.count),
            " x ".join(map(str, group.shape)),
            str(group.rank),
            f"{group.scale:g}",
            group.base,
            format_size(group.base_bytes),
            group.run_by,
        )
    return table


def _skipped_table(plan: AttachPlan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("role", "not adapted", "count", "why"):
        table.add_column(column, justify="right" if column == "count" else "left")
    for group in skipped(plan):
        table.add_row(group.role, group.name, str(group.count), group.reason)
    return table
