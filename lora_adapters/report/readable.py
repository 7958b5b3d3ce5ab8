"""Numbers, times and texts as people read them."""

from __future__ import annotations

import math
from typing import Any


def as_number(value: Any) -> float | None:
    """Return a number, which may be nan or inf (also as the texts that JSON files hold instead), or None if it is none."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return float(value) if value in ("nan", "inf", "-inf") else None


def number(value: Any) -> str:
    """Return a number with the digits that matter: 1,234 or 0.8123 or 2e-05. Other things come as plain text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    as_float = as_number(value)
    if as_float is None:
        return text(value)
    if not math.isfinite(as_float):
        return "not finite"
    return f"{as_float:,.0f}" if 1e3 <= abs(as_float) < 1e15 else f"{as_float:.4g}"


def text(value: Any) -> str:
    """Return any plain data as text: lists with commas, mappings as "name: value"."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {number(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(number(item) for item in value)
    return str(value)


def duration(seconds: float) -> str:
    """Return a time in its two largest units: "1 h 12 min"."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    raise AssertionError("unreachable")


def share(part: float, whole: float) -> str:
    """Return a share in percent, "-" of nothing."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    return f"{percent:.1f} %" if percent >= 10 else f"{percent:.2f} %" if percent >= 0.1 else f"{percent:.2g} %"


def moment(iso: str) -> str:
    """Return "2026-01-31 12:05 UTC" of an ISO 8601 time in UTC; anything else as it is."""
    day, separator, time = iso.partition("T")
    return f"{day} {time[:5]} UTC" if separator and time.endswith(("Z", "+00:00")) else iso


def writable(document: str) -> str:
    """Return the text with "?" for halves of characters, which JSON data may hold and no file can."""
    return document.encode("utf-8", "replace").decode("utf-8")


def words(name: str) -> str:
    """Return a name in snake case as words, for headings: "eval_accuracy" is "eval accuracy"."""
    return name.replace("_", " ")
