"""Sizes as people write them, and the settings of a training step that fit a memory budget."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import MissingDependencyError, RequestError, UnsupportedError

if TYPE_CHECKING:
    from .attach_plan import AttachPlan
    from .memory import StepMemory

#: Stands in a FitSetting for a mapping of formats to roles, which is no key.
AS_ASKED = "as asked"

_UNITS = {"": 1, "b": 1, **{f"{p}ib": 1 << 10 * i for i, p in enumerate("kmgt", 1)}}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}


def parse_size(size: str | int) -> int:
    """Return bytes: "16GiB" (powers of 1024), "16 GB" (powers of 1000), or a number of bytes.

    Raises:
        RequestError: not a size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    if isinstance(size, bool) or match is None or match[2] not in _UNITS:
        raise RequestError(f'{size!r} is not a size; write "16GiB", "16GB" or a number of bytes.')
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(size: int) -> str:
    """Return bytes in the largest unit that leaves at least 1: "5.1 GiB"."""
    value, unit = float(size), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def format_shape(rows: int, length: int) -> str:
    """Return the shape of a training step: "4 x 512", or "4 rows" for a task whose rows have no length."""
    return f"{rows} x {length}" if length > 1 else f"{rows} row{'s' if rows > 1 else ''}"


@dataclass(frozen=True)
class FitSetting:
    """Settings of a training step that fit a budget, and the bytes they take.

    `quantization` is the base's format, None for dense; AS_ASKED for a mapping by roles.
    """

    batch_size: int
    sequence_length: int
    checkpointing: bool
    quantization: str | None
    nbytes: int


def suggest_fit(
    memory: Callable[[int, int, bool, str | None], int],
    budget: str | int,
    *,
    batch_size: int,
    sequence_length: int,
    quantizations: Iterable[str | None] = (None, "nf4"),
    count: int = 3,
    shortest: int = 1,
) -> list[FitSetting]:
    """Return up to `count` settings that fit, nearest to what was asked for first; empty if none does.

    The batch is halved before the sequence (gradient accumulation makes up for a batch, nothing for a sequence).

    Args:
        memory: bytes of a step for (batch_size, sequence_length, checkpointing, quantization). An UnsupportedError with
            checkpointing says that the model has none.
        budget: bytes, or a size such as "16GiB".
        batch_size, sequence_length: what is wanted.
        quantizations: formats of the base to try, in order of preference.
        count: how many settings to return.
        shortest: no sequence becomes shorter than this.
    """
    limit, formats = parse_size(budget), tuple(quantizations)
    batches = _halvings(batch_size)
    lengths = [n for n in _halvings(sequence_length) if n >= min(shortest, sequence_length)]

    def fitting(batch: int, length: int, quantization: str | None) -> FitSetting | None:
        for checkpointing in (False, True):
            try:
                nbytes = memory(batch, length, checkpointing, quantization)
            except UnsupportedError:
                if not checkpointing:
                    raise
                return None  # a model that can't be checkpointed
            if nbytes <= limit:
                return FitSetting(batch, length, checkpointing, quantization, nbytes)
        return None

    if not any(fitting(1, lengths[-1], quantization) for quantization in formats):
        return []  # a hundred predictions would be in vain
    found: list[FitSetting] = []
    for length in lengths:
        for batch in batches:
            found += filter(None, (fitting(batch, length, quantization) for quantization in formats))
            if len(found) >= count:
                return found[:count]
    return found


def suggest_settings(
    made: AttachPlan,
    plan: Callable[[Any], AttachPlan],
    memory: Callable[[AttachPlan, int, int, bool], StepMemory],
    budget: str | int,
    *,
    quantization: Any,
    batch_size: int,
    sequence_length: int,
    checkpointing: bool,
    shortest: int = 1,
) -> list[FitSetting]:
    """Return settings of a planned step that fit, as `suggest_fit` does, with the base as asked or, if dense, in NF4.

    Checkpointing that was asked for stays.

    Args:
        made: the plan of what was asked for.
        plan: makes a plan for a quantization.
        memory: predicts a step of (plan, batch_size, sequence_length, checkpointing).
        budget, shortest: see `suggest_fit`.
        quantization, batch_size, sequence_length, checkpointing: what was asked for.
    """
    plans = {quantization if quantization is None or isinstance(quantization, str) else AS_ASKED: made}
    if quantization is None:
        with contextlib.suppress(MissingDependencyError):  # what is not installed is no way out
            plans["nf4"] = plan("nf4")
    found = suggest_fit(
        lambda rows, length, checkpointed, name: memory(plans[name], rows, length, checkpointed or checkpointing).total,
        budget,
        batch_size=batch_size,
        sequence_length=sequence_length,
        quantizations=plans,
        shortest=shortest,
    )
    return [replace(setting, checkpointing=setting.checkpointing or checkpointing) for setting in found]


def _halvings(number: int) -> list[int]:
    if number < 1:
        raise RequestError(f"Batch size and sequence length must be at least 1, got {number}.")
    return [number >> i for i in range(number.bit_length())]
