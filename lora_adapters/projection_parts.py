"""q, k and v of a fused projection, each adapted by ranks of its own: what was asked, and what a file says of it.

A layer adapted in parts is one LoRA whose rank is the sum of the parts' ranks, so it has one scale. Each part keeps the
scale it would have as a layer of its own, which is why they must agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, RequestError
from .targets import Part, Rows

if TYPE_CHECKING:
    from .request import AttachRequest

_ROLES = ("q", "k", "v")


def row_count(rows: Rows) -> int:
    """Return how many rows these ranges hold."""
    return sum(end - first for first, end in rows)


def in_parts(
    name: str, asked: Mapping[str, tuple[int, float]], rows: Mapping[str, Rows], request: AttachRequest
) -> tuple[tuple[Part, ...], float]:
    """Return a layer's parts, in the layer's order, and the alpha that gives them their scale.

    Args:
        name: of the layer.
        asked: role -> (rank, alpha) as a layer of its own would have them.
        rows: role -> its rows.
        request: knows the scale of a rank and an alpha.

    Raises:
        RequestError: the parts would have different scales.
    """
    parts = tuple(Part(role, asked[role][0], rows[role]) for role in rows if role in asked)
    scales = {part.role: request.scaling(*asked[part.role]) for part in parts}
    scale = scales[parts[0].role]
    if not all(math.isclose(other, scale, rel_tol=1e-9) for other in scales.values()):
        shown = ", ".join(f"{role}: {value:g}" for role, value in scales.items())
        rule = "alpha / sqrt(rank)" if request.rslora else "alpha / rank"
        raise RequestError(
            f"{name!r} holds these projections in one layer, which has one scale, and {rule} differs ({shown}). Give "
            f"each an alpha that makes {rule} the same."
        )
    if request.rslora:
        return parts, scale * math.sqrt(sum(part.rank for part in parts))
    return parts, sum(asked[part.role][1] for part in parts)


def check_rows(name: str, parts: Sequence[Part], shape: tuple[int, ...]) -> None:
    """Raise RequestError if a part's rank is larger than its rows allow."""
    width = math.prod(shape[1:])
    for part in parts:
        if part.rank > (largest := min(row_count(part.rows), width)):
            raise RequestError(
                f"rank {part.rank} is larger than {part.role!r} in layer {name!r}, which is {row_count(part.rows)} x "
                f"{width}: its rank is at most {largest}. Ask for a smaller one: targets={{{part.role!r}: {largest}}}."
            )


def smaller(parts: Sequence[Part], width: int, largest: Any) -> tuple[Part, ...]:
    """Return the parts with ranks of at most largest(rows, width), without those for which that is 0."""
    bound = [replace(part, rank=min(part.rank, largest(row_count(part.rows), width))) for part in parts]
    return tuple(part for part in bound if part.rank)


# ---- in an adapter's file -------------------------------------------------------------------------------------------


def to_metadata(layers: Mapping[str, Sequence[Part]]) -> str:
    """Return layer -> parts as one string."""
    entry = {name: [[part.role, part.rank, part.rows] for part in parts] for name, parts in layers.items()}
    return json.dumps(entry, separators=(",", ":"))


def from_metadata(entry: str, modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Part, ...]]:
    """Return layer -> parts of a file's entry, nothing of it trusted.

    Args:
        entry: what `to_metadata` wrote, or anything else.
        modules: layer -> (rank, rows of its weight), of every layer in the file.

    Raises:
        CheckpointError: it is not an entry that fits these layers.
    """
    found: dict[str, tuple[Part, ...]] = {}
    try:
        found = {
            name: tuple(Part(role, rank, tuple((first, end) for first, end in rows)) for role, rank, rows in parts)
            for name, parts in json.loads(entry).items()
        }
        good = all(name in modules and _fits(parts, *modules[name]) for name, parts in found.items())
    except (ValueError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise CheckpointError(
            "The file's entry about parts of fused projections is damaged or of another model. Copy or download the file "
            "again."
        )
    return found


def _fits(parts: Sequence[Part], rank: int, out: int) -> bool:
    """Return True if these parts can be those of a layer with this rank and this many rows."""
    numbers = [n for part in parts for n in (part.rank, *(edge for pair in part.rows for edge in pair))]
    if not parts or any(type(n) is not int for n in numbers) or any(part.rank < 1 for part in parts):
        return False
    roles = [part.role for part in parts]
    if not set(roles) <= set(_ROLES) or len(set(roles)) < len(roles) or sum(part.rank for part in parts) != rank:
        return False
    for part in parts:
        edges = [edge for pair in part.rows for edge in pair]
        ascending = all(first < end for first, end in part.rows) and edges == sorted(edges)
        if not part.rows or not ascending or edges[0] < 0 or edges[-1] > out:
            return False
    return True
