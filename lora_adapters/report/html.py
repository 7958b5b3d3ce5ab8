"""A run as one HTML file that opens from disk without a network."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..budget import format_size
from .charts import charts
from .readable import as_number, duration, moment, number, share, text, words, writable

if TYPE_CHECKING:
    from markupsafe import Markup

    from .facts import RunFacts, Table

#: Status -> (what a person calls it, how serious it is: a CSS class).
_STATUS = {
    "finished": ("finished", "good"),
    "running": ("not finished", "note"),
    "interrupted": ("interrupted", "note"),
    "diverged": ("diverged", "bad"),
    "failed": ("failed", "bad"),
}
_BANNER = {
    "running": "This run has not finished. It is still at work, or it was killed.",
    "interrupted": "This run was interrupted; resume=true goes on from here.",
    "diverged": "Training diverged: values were no longer finite.",
    "failed": "This run failed.",
}


@dataclass(frozen=True)
class Change:
    """A metric before and after, all as text; `verdict` is "better", "worse", "same", or "" if that can't be told."""

    name: str
    before: str
    after: str
    change: str = ""
    relative: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Bar:
    """A row of the memory table: bytes, and where its bar lies, in percent of the widest."""

    name: str
    size: str
    start: float
    width: float
    kind: str


def render_report(facts: RunFacts, history: list[dict[str, Any]]) -> str:
    """Return the report as one HTML document. It fetches nothing, runs no script and escapes every text.

    Args:
        facts: what is known of the run.
        history: rows of metrics.jsonl: "step", "epoch" and some of loss, learning_rate, grad_norm, adapter_norm, eval_*.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("lora_adapters.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "text": text,
        "size": format_size,
        "words": words,
        "breakable": _breakable,
    }
    label, kind = _STATUS[facts.status]
    page = environment.get_template("report.html.j2").render(
        facts=facts,
        status=label,
        kind=kind,
        banner=_BANNER.get(facts.status, ""),
        started=moment(facts.started),
        key_numbers=key_numbers(facts),
        changes=changes(facts),
        charts=charts(history, facts.resumed_from),
        memory=memory_bars(facts),
        tables=[(table, _numeric_columns(table), _shades(table)) for table in facts.tables],
        recipe=_as_yaml(facts.recipe),
    )
    return writable(page)


def key_numbers(facts: RunFacts) -> list[tuple[str, str, str]]:
    """Return (name, value, small print) of the run's most important numbers."""
    found = [("Steps", number(facts.steps), f"of {number(facts.total_steps)}" if facts.total_steps else "")]
    if facts.skipped_steps:
        found.append(("Steps skipped", number(facts.skipped_steps), "gradient not finite"))
    found.append(("Epochs", number(round(facts.epochs, 2)), ""))
    found.append(("Training time", duration(facts.seconds) if facts.seconds else "-", ""))
    found += [(f"{words(what).capitalize()} per second", number(rate), "") for what, rate in facts.throughput.items()]
    if facts.trainable_parameters:
        of = f"{number(facts.trainable_parameters)} of {number(facts.total_parameters)} values"
        found.append(("Trainable", share(facts.trainable_parameters, facts.total_parameters), of))
    if facts.adapter_bytes:
        found.append(("Adapter size", format_size(facts.adapter_bytes), ""))
    if "peak" in facts.memory_measured:
        planned = facts.memory_planned.get("total")
        of = f"planned {format_size(planned)}" if planned else ""
        found.append(("Peak memory", format_size(facts.memory_measured["peak"]), of))
    return found


def changes(facts: RunFacts) -> list[Change]:
    """Return the metrics of the base and of the adapter side by side."""
    return [
        _change(name, facts.before.get(name), facts.after.get(name), name in facts.higher_is_better)
        for name in dict.fromkeys([*facts.before, *facts.after])
    ]


def _change(name: str, before: Any, after: Any, higher_is_better: bool) -> Change:
    shown = (number(before), number(after))
    old, new = as_number(before), as_number(after)
    if old is None or new is None or not math.isfinite(old):
        return Change(name, *shown)
    if not math.isfinite(new):
        return Change(name, *shown, verdict="worse")
    difference = new - old
    sign = "-" if difference < 0 else "+"
    change = f"{sign}{number(abs(difference))}" if difference else "±0"
    relative = f"({sign}{abs(difference / old):.1%})".replace("%", " %") if old and difference else ""
    verdict = "same" if not difference else "better" if (difference > 0) == higher_is_better else "worse"
    return Change(name, *shown, change, relative, verdict)


def memory_bars(facts: RunFacts) -> list[Bar]:
    """Return the planned parts one after the other, their total, and what was measured, on one scale."""
    parts = {name: size for name, size in facts.memory_planned.items() if name != "total"}
    total = facts.memory_planned.get("total", sum(parts.values()))
    widest = max([total, sum(parts.values()), *facts.memory_measured.values(), 1])
    bars, start = [], 0
    for name, size in parts.items():
        bars.append(_bar(words(name).capitalize(), size, start, widest, "part"))
        start += size
    if facts.memory_planned:
        bars.append(_bar("Planned in all", total, 0, widest, "total"))
    names = {"peak": "Measured peak", "before": "of it before training"}
    for name in sorted(facts.memory_measured, key=lambda name: (*names, name).index(name)):
        shown = names.get(name, f"Measured: {words(name)}")
        bars.append(_bar(shown, facts.memory_measured[name], 0, widest, "before" if name == "before" else "measured"))
    return bars


def _bar(name: str, size: int, start: int, widest: int, kind: str) -> Bar:
    return Bar(name, format_size(size), round(100 * start / widest, 2), round(100 * size / widest, 2), kind)


def _breakable(name: str) -> Markup:
    """Return a module's name that a line may break after each dot."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=\.)", name))


def _is_numeric(value: Any) -> bool:
    return as_number(value) is not None or bool(re.fullmatch(r"[-+]?[\d.,]+\s?%?", str(value)))


def _numeric_columns(table: Table) -> list[bool]:
    """Return for each column whether all its cells are numbers: these are set flush right."""
    columns = [[row[index] for row in table.rows if index < len(row)] for index in range(len(table.header))]
    return [bool(cells) and all(_is_numeric(cell) for cell in cells) for cells in columns]


def _shades(table: Table) -> list[list[int]]:
    """Return for each cell how strongly it is coloured, in percent: 0 but for the numbers of a shaded table."""
    found = []
    for row in table.rows:
        values = [as_number(cell) or 0.0 for cell in row]
        values = [value if table.shaded and math.isfinite(value) and value > 0 else 0.0 for value in values]
        found.append([round(100 * value / (sum(values) or 1.0)) for value in values])
    return found


def _as_yaml(recipe: dict[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes texts of several lines as they are read, not folded into quotes."""

    def as_read(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, as_read)
    return yaml.dump(recipe, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100).rstrip() if recipe else ""
