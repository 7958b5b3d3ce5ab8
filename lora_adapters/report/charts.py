"""Curves of a run as SVG that stands in an HTML page and takes its colours and font from there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from .readable import as_number, number, words

#: What matplotlib draws in -> what the page says instead, so that one drawing serves light, dark and paper.
_COLOURS = {
    "#010101": "var(--line-1)",
    "#010102": "var(--line-2)",
    "#010103": "var(--muted)",
    "#010104": "var(--grid)",
    "#010105": "var(--bad)",
}
_LINES, _MUTED, _GRID, _BAD = ("#010101", "#010102"), "#010103", "#010104", "#010105"
#: Width and height in CSS pixels. The wide form is for screens that have the room, the small one for all others.
_WIDE, _SMALL = (960, 300), (430, 240)
#: Beyond what float32 holds: as good as infinite, and more than an axis can be laid out for.
_LARGEST = 3.5e38
#: Up to this many points each gets a mark.
_MARKED = 30
#: Values that span more than this ratio get a logarithmic axis.
_LOG_RATIO = 500
#: Evaluation times, which say nothing about the adapter.
_TIMES = re.compile(r"_(runtime|per_second|time)$")


@dataclass(frozen=True)
class Series:
    """Points of one curve, sorted by step. `values` holds nan where a value was not finite."""

    label: str
    steps: list[float]
    values: list[float]

    @property
    def finite(self) -> list[float]:
        """The values that can be drawn."""
        return [value for value in self.values if not math.isnan(value)]

    @property
    def broken(self) -> list[float]:
        """Steps whose value was not finite."""
        return [step for step, value in zip(self.steps, self.values, strict=True) if math.isnan(value)]


@dataclass(frozen=True)
class Chart:
    """One figure of the page.

    Attributes:
        title: heading.
        label: what a screen reader says of it.
        legend: (number of the line's colour, what it is) pairs, if there is more than one line.
        remarks: what the drawing does not show.
        drawings: ("wide" or "small" or "any", SVG) pairs; the page shows the one that fits. Empty if nothing is finite.
    """

    title: str
    label: str
    legend: list[tuple[int, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    drawings: list[tuple[str, str]] = field(default_factory=list)


def charts(history: Sequence[Mapping[str, Any]], resumed_from: Iterable[int] = ()) -> list[Chart]:
    """Return the curves that a history has points for: loss, learning rate, gradient norm, and what else was evaluated.

    Args:
        history: rows with "step" and some numbers; a number may be missing, None, nan or inf, or the texts "nan", "inf".
        resumed_from: steps at which the run was taken up again; they are marked.
    """
    wanted: list[tuple[str, dict[str, str]]] = [
        ("Loss", {"loss": "training", "eval_loss": "evaluation"}),
        ("Learning rate", {"learning_rate": "learning rate"}),
        ("Gradient norm", {"grad_norm": "gradient norm"}),
        ("Adapter norm", {"adapter_norm": "adapter norm"}),
    ]
    known = {key for _, keys in wanted for key in keys}
    others = {key for row in history for key in row if str(key).startswith("eval_") and key not in known}
    for key in sorted(others):
        if not _TIMES.search(key) and len(_series(history, key, "").values) > 1:
            name = words(key.removeprefix("eval_"))
            wanted.append((name[:1].upper() + name[1:], {key: name}))
    made = []
    for index, (title, keys) in enumerate(wanted):
        lines = [_series(history, key, label) for key, label in keys.items()]
        if any(line.steps for line in lines):
            made.append(_chart(title, lines, sorted(set(resumed_from)), index))
    return made


def _series(history: Iterable[Mapping[str, Any]], key: str, label: str) -> Series:
    points: list[tuple[float, float]] = []
    for row in history:
        step, value = as_number(row.get("step")), as_number(row.get(key))
        if value is not None and step is not None and math.isfinite(step):
            points.append((step, value if abs(value) <= _LARGEST else math.nan))
    points.sort(key=lambda point: point[0])
    return Series(label, [step for step, _ in points], [value for _, value in points])


def _chart(title: str, lines: list[Series], resumed: list[int], index: int) -> Chart:
    drawn = [line for line in lines if line.finite]
    log = _wants_log([value for line in drawn for value in line.finite])
    remarks = ["Logarithmic axis."] if log else []
    for line in lines:
        if count := len(line.broken):
            kind = f"{line.label} " if len(lines) > 1 else ""
            points = f"1 {kind}point was" if count == 1 else f"{count:,} {kind}points were"
            remarks.append(f"{points} not finite, the first at step {number(line.broken[0])} (crosses).")
    if resumed and drawn and index == 0:
        remarks.append(f"Resumed at step {', '.join(number(step) for step in resumed)} (dotted).")
    sizes = (("wide", _WIDE), ("small", _SMALL)) if index == 0 else (("any", _SMALL),)
    label = f"{title} by step: " + ("; ".join(_in_words(line) for line in drawn) or "no finite value") + "."
    return Chart(
        title=title,
        label=label,
        legend=[(colour, line.label) for colour, line in enumerate(lines, 1) if line.finite] if len(drawn) > 1 else [],
        remarks=remarks,
        drawings=[
            (name, _draw(lines, size, log, resumed, salt=f"chart-{index}-{name}")) for name, size in sizes if drawn
        ],
    )


def _in_words(line: Series) -> str:
    values = line.finite
    if len(values) == 1:
        return f"{line.label} {number(values[0])}"
    first, last, low, high = map(number, (values[0], values[-1], min(values), max(values)))
    return f"{line.label} from {first} to {last}, between {low} and {high}"


def _wants_log(values: list[float]) -> bool:
    return bool(values) and min(values) > 1 / _LARGEST and max(values) / min(values) > _LOG_RATIO


def _draw(lines: list[Series], size: tuple[int, int], log: bool, resumed: list[int], salt: str) -> str:
    """Return one `<svg>`: nothing in it but shapes and numbers."""
    import matplotlib

    width, height = size
    with matplotlib.rc_context():
        # A person's own style must not show here, and the same run must give the same page.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 12})
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        if log:
            axes.set_yscale("log")
        for step in resumed:
            axes.axvline(step, color=_MUTED, linewidth=1, linestyle=(0, (1, 3)))
        for line, colour in zip(lines, _LINES, strict=False):
            _plot(axes, line, colour)
        left = _style(axes, log)
        figure.subplots_adjust(left=left / width, right=1 - 22 / width, bottom=44 / height, top=1 - 10 / height)
        out = StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return _for_page(out.getvalue())


def _plot(axes: Any, line: Series, colour: str) -> None:
    marked = len(line.values) <= _MARKED
    axes.plot(line.steps, line.values, color=colour, linewidth=1.6, solid_joinstyle="round", zorder=3)
    # A point between two gaps has no line through it.
    around = [math.nan, *line.values, math.nan]
    alone = [math.isnan(a) and math.isnan(b) for a, b in zip(around, around[2:], strict=False)]
    dots = [(s, v) for s, v, single in zip(line.steps, line.values, alone, strict=True) if marked or single]
    if dots:
        axes.plot(*zip(*dots, strict=True), linestyle="none", marker="o", markersize=4.5, color=colour, zorder=4)
    if line.broken:
        foot = axes.get_xaxis_transform()
        bottom = [0.0] * len(line.broken)
        axes.plot(
            line.broken, bottom, transform=foot, linestyle="none", marker="x", markersize=7, color=_BAD, clip_on=False
        )


def _style(axes: Any, log: bool) -> float:
    """Make the axes quiet; return the room that the numbers on the left need, in pixels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.patch.set_visible(False)
    axes.margins(x=0.01, y=0.08)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_MUTED)
        spine.set_linewidth(1)
    axes.grid(axis="y", color=_GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_MUTED, pad=7)
    axes.set_xlabel("step", color=_MUTED, labelpad=4)
    low, high = axes.get_xlim()
    if high - low < 2:
        axes.set_xlim(low - 1, high + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(numticks=6) if log else MaxNLocator(nbins=5))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    low, high = axes.get_ylim()
    small = max(abs(low), abs(high)) < 1e-3
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, small)))
    labels = [_tick(tick, small) for tick in axes.yaxis.get_major_locator()() if low <= tick <= high]
    return 16 + 7.4 * max(map(len, labels), default=1)


def _tick(value: float, small: bool) -> str:
    """Return the number beside a line; all numbers of an axis of small values have an exponent: 5e-5, 1e-4."""
    plain = f"{value:,.6g}" if not small or not value else f"{value:.6e}"
    mantissa, exponent, power = plain.partition("e")
    if not exponent:
        return plain
    return f"{float(mantissa):g}e{int(power)}"


def _for_page(svg: str) -> str:
    """Return matplotlib's file as an element of a page: no addresses, no names that others have, the page's colours."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href=", "href=")
    svg = re.sub(r"font-family: [^;\"]*;?\s*", "", svg)
    for sentinel, colour in _COLOURS.items():
        svg = svg.replace(sentinel, colour)
    return svg
