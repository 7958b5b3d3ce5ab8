"""Adapters of layers that one model fuses and another keeps apart, such as q, k and v: joined and split exactly.

Joined, layers with factors (A_i, B_i) are one with A = [A_1; A_2; ...] and B block-diagonal, or, where all share one A, that
A and B = [B_1; B_2; ...]. Split, a block-diagonal B gives each layer its own rows of A back, any other B the whole A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .factors import Factors, LohaFactors, LoraFactors
from .low_rank import low_rank


@dataclass(frozen=True)
class Part:
    """What a joined adapter's record says of one of its layers: enough to split it exactly as it was joined.

    Attributes:
        rank: 0 for a layer without an adapter.
        alpha, rank_stabilised: its own.
        dtype: torch's word for the dtype of both its factors.
        scale: what its B was multiplied with.
    """

    rank: int
    alpha: float = 0.0
    rank_stabilised: bool = False
    dtype: str = "float32"
    scale: float = 1.0

    @classmethod
    def of(cls, factors: LoraFactors | None, scaling: float | None = None) -> Part:
        """Describe one layer, joined under another scaling (None for its own)."""
        if factors is None:
            return cls(0)
        dtype = str(torch.promote_types(factors.a.dtype, factors.b.dtype)).removeprefix("torch.")
        scale = 1.0 if scaling is None else factors.scaling / scaling
        return cls(factors.rank, factors.alpha, factors.rank_stabilised, dtype, scale)


def rows(factors: Factors, start: int, stop: int) -> Factors:
    """Return the adapter of rows start:stop of a linear layer's weight. LoKr becomes LoRA first, the rest keeps its kind."""
    if not isinstance(factors, LohaFactors):
        factors = low_rank(factors)
    magnitude = factors.magnitude
    if magnitude is not None:
        if factors.magnitude_axis != "output":
            raise UnsupportedError(
                "A magnitude for each input can't be split among layers with inputs of their own. Merge the adapter instead."
            )
        magnitude = magnitude[start:stop]
    if isinstance(factors, LohaFactors):
        return replace(factors, w1_a=factors.w1_a[start:stop], w2_a=factors.w2_a[start:stop], magnitude=magnitude)
    assert isinstance(factors, LoraFactors)
    bias = None if factors.bias is None else factors.bias[start:stop]
    return replace(factors, b=factors.b[start:stop].contiguous(), bias=bias, magnitude=magnitude)


def swap_halves(factors: Factors) -> Factors:
    """Return the adapter of a layer whose first and second half of rows change places."""
    half = factors.shape[0] // 2
    first, second = rows(factors, 0, half), rows(factors, half, 2 * half)
    names = ("w1_a", "w2_a", "magnitude") if isinstance(first, LohaFactors) else ("b", "bias", "magnitude")
    both = {name: (getattr(second, name), getattr(first, name)) for name in names}
    return replace(first, **{name: torch.cat(pair) for name, pair in both.items() if pair[0] is not None})


def split(factors: Factors, sizes: Sequence[int], record: Sequence[Part] | None = None) -> list[Factors | None]:
    """Return the adapters of the layers whose rows are fused.

    Args:
        factors: the fused layer's, linear.
        sizes: rows of each layer, in order.
        record: how it was joined, by the file that holds it; None to go by B's zeros.

    Returns:
        One for each layer; None where the record says that it had none.
    """
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if not isinstance(factors, LoraFactors) or factors.mid is not None:
        return [rows(factors, start, stop) for start, stop in spans]
    ranks = [part.rank for part in record] if record and len(record) == len(spans) else []
    if ranks and sum(ranks) == factors.rank:
        columns = [(sum(ranks[:index]), sum(ranks[: index + 1])) for index in range(len(ranks))]
    elif ranks and set(ranks) == {factors.rank}:
        columns = None
    else:  # No record, or the file was changed since.
        record, columns = None, _diagonal(factors.b, spans)
    found = []
    for index, span in enumerate(spans):
        part = _columns(factors, span, columns[index]) if columns else rows(factors, *span)
        found.append(_as_recorded(part, record[index]) if record and part is not None else part)
    return found


def _columns(factors: LoraFactors, span: tuple[int, int], columns: tuple[int, int]) -> LoraFactors | None:
    """Return the adapter of one block; None if it has no columns."""
    left, right = columns
    if left == right:
        return None
    part = rows(factors, *span)
    assert isinstance(part, LoraFactors)
    alpha = float(Fraction(factors.alpha) * (right - left) / factors.rank)
    return replace(part, a=factors.a[left:right].contiguous(), b=part.b[:, left:right].contiguous(), alpha=alpha)


def _as_recorded(part: Factors, record: Part) -> Factors:
    """Give a layer the alpha and dtype it had, and its B the scale that goes with them."""
    assert isinstance(part, LoraFactors)
    old = replace(part, alpha=record.alpha, rank_stabilised=record.rank_stabilised)
    dtype = getattr(torch, record.dtype)
    b = part.b if record.scale == 1 else part.b.double() / record.scale
    return replace(old, a=part.a.to(dtype), b=b.to(dtype))


def _diagonal(b: Tensor, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """Return each layer's columns if B is block-diagonal, with blocks in order and none without a column, else None."""
    owned = torch.stack([(b[start:stop] != 0).any(0) for start, stop in spans])
    rank, count = b.shape[1], len(spans)
    equal = rank // count
    if rank % count == 0 and not _outside(owned, [(equal * i, equal * (i + 1)) for i in range(count)]):
        return [(equal * i, equal * (i + 1)) for i in range(count)]
    if bool((owned.sum(0) > 1).any()):
        return None
    owner, columns, left = owned.int().argmax(0), [], 0
    for index in range(count):
        mine = torch.nonzero(owned.any(0) & (owner == index)).flatten().tolist()
        if not mine:
            return None
        columns.append((left, max(mine) + 1))
        left = max(mine) + 1
    columns[-1] = (columns[-1][0], rank)
    return None if _outside(owned, columns) else columns


def _outside(owned: Tensor, columns: Sequence[tuple[int, int]]) -> bool:
    """Return True if a layer has values in columns that are not its own."""
    return any(
        bool(mine[:left].any() or mine[right:].any()) for mine, (left, right) in zip(owned, columns, strict=True)
    )


def join(parts: Sequence[Factors | None], sizes: Sequence[int]) -> tuple[LoraFactors, list[Part], float]:
    """Return the adapter of the layer that fuses several.

    Args:
        parts: their adapters, in the order of the fused rows; None for a layer without one.
        sizes: rows of each.

    Returns:
        The fused adapter, the record that splits it again, and the largest relative rounding error of B: 0.0 where the
        layers' scalings are equal or powers of two apart, else at most 6e-8 (B is then held in float32).

    Raises:
        UnsupportedError: some have a magnitude or a bias and others have not, so that the fused layer's is unknown.
    """
    made = [None if part is None else low_rank(part) for part in parts]
    present = [part for part in made if part is not None]
    extras = {name: _extra(made, name) for name in ("magnitude", "bias")}
    first = present[0]
    if len(present) == len(made) and all(_same(first, part) for part in present):
        b = torch.cat([part.b for part in present])
        return replace(first, b=b, **extras), [Part.of(part) for part in made], 0.0
    rank = sum(part.rank for part in present)
    scaling = max(present, key=lambda part: sum(part.scaling == other.scaling for other in present)).scaling or 1.0
    record = [Part.of(part, scaling) for part in made]
    blocks, error = zip(*(_scaled(part, scaling) for part in present), strict=True)
    dtype_a = reduce(torch.promote_types, (part.a.dtype for part in present))
    dtype_b = reduce(torch.promote_types, (block.dtype for block in blocks))
    b, row, column, waiting = torch.zeros(sum(sizes), rank, dtype=dtype_b), 0, 0, iter(blocks)
    for part, size in zip(made, sizes, strict=True):
        if part is not None:
            b[row : row + size, column : column + part.rank] = next(waiting)
            column += part.rank
        row += size
    a = torch.cat([part.a.to(dtype_a) for part in present])
    return replace(LoraFactors(a=a, b=b, alpha=float(Fraction(scaling) * rank)), **extras), record, max(error)


def _extra(made: Sequence[LoraFactors | None], name: str) -> Tensor | None:
    """Return the fused magnitude or bias."""
    values = [None if part is None else getattr(part, name) for part in made]
    if all(value is None for value in values):
        return None
    if any(value is None for value in values) or any(part and part.magnitude_axis != "output" for part in made):
        raise UnsupportedError(
            f"Of layers that this format fuses into one, some have a {name} and others have not, and the fused layer's "
            "can't be told without the base model. Adapt all of them with DoRA, or none; or keep the diffusers format."
        )
    return torch.cat([value for value in values if value is not None])


def _same(one: LoraFactors, other: LoraFactors) -> bool:
    """Return True if two layers share A and scaling."""
    dtypes = (one.a.dtype, one.b.dtype) == (other.a.dtype, other.b.dtype)
    scalings = (one.alpha, one.rank_stabilised) == (other.alpha, other.rank_stabilised)
    return dtypes and scalings and torch.equal(one.a, other.a)


def _scaled(part: LoraFactors, scaling: float) -> tuple[Tensor, float]:
    """Return B for another scaling, and its relative rounding error."""
    ratio = part.scaling / scaling
    if ratio == 1:
        return part.b, 0.0
    exact, wide = part.b.double() * ratio, torch.promote_types(part.b.dtype, torch.float32)
    power_of_two = math.frexp(abs(ratio))[0] == 0.5
    if power_of_two and torch.equal(exact.to(part.b.dtype).double(), exact):
        return exact.to(part.b.dtype), 0.0
    rounded = exact.to(wide)
    unrounded = power_of_two and torch.equal(rounded.double(), exact)
    return rounded, 0.0 if unrounded else torch.finfo(wide).eps / 2
