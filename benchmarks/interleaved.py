"""What the benchmarks share: timing several things in turn, ratios within a round, and tables."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def seconds(variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> list[dict[str, float]]:
    """Return one dict of seconds a round. Every round runs each variant once, every other round in reverse order.

    A machine that slows down for a while slows all of a round, and no variant always runs after the same other one.
    """
    names, found = list(variants), []
    for turn in range(warmup + rounds):
        times = {}
        for name in names if turn % 2 else reversed(names):
            start = time.perf_counter()
            variants[name]()
            times[name] = time.perf_counter() - start
        found.append(times)
    return found[warmup:]


def median(rounds: Sequence[Mapping[str, float]], name: str) -> float:
    """Return the median of one variant."""
    return statistics.median(times[name] for times in rounds)


def ratio(rounds: Sequence[Mapping[str, float]], name: str, other: str) -> float:
    """Return the median over rounds of one variant's time over another's of the same round."""
    return statistics.median(times[name] / times[other] for times in rounds)


def table(rows: Sequence[Mapping[str, object]], digits: int = 2) -> str:
    """Return rows with the same keys as a markdown table; numbers with so many decimals, or one from 100 up."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(_text(value, digits) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def _text(value: object, digits: int) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if value >= 100 else f"{value:.{digits}f}"
    return "" if value is None else str(value)


def tell(jobs: Iterable[Callable[[], list[dict[str, Any]]]], device: str, as_json: bool) -> None:
    """Run jobs one after the other, each of which returns rows; print a table of each, or one JSON list of all."""
    import torch

    found: list[dict[str, Any]] = []
    if not as_json:
        print(torch.cuda.get_device_name() if device == "cuda" else "CPU", "torch", torch.__version__)
    for job in jobs:
        rows = job()
        found += rows
        if not as_json:
            print(table(rows), flush=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if as_json:
        print(json.dumps(found, indent=1))
