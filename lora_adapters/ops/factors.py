"""The factors of several adapters as one: A stacked by rows, scaling * B side by side, in the dtype to compute in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .autocast import cast


class Stack:
    """All adapters of one layer, as two matrices.

    Attributes:
        a: (sum of ranks, in * prod(kernel)).
        b: (out, sum of ranks), scalings included.
        ranks: of each adapter.
    """

    __slots__ = ("_factors", "_scalings", "a", "b", "each_a", "ranks")

    def __init__(self, factors: Sequence[torch.Tensor], scalings: Sequence[float], dtype: torch.dtype) -> None:
        """Stack A_1, B_1, A_2, B_2, ... of shapes (rank, in, *kernel) and (out, rank, 1...)."""
        self._factors, self._scalings = factors, scalings
        self.each_a = [_matrix(a, 1, dtype) for a in factors[0::2]]
        scaled = [_matrix(b, s, dtype) for b, s in zip(factors[1::2], scalings, strict=True)]
        self.ranks = [a.shape[0] for a in self.each_a]
        self.a = self.each_a[0] if len(scaled) == 1 else torch.cat(self.each_a)
        self.b = scaled[0] if len(scaled) == 1 else torch.cat(scaled, 1)

    def gradients(self, da: torch.Tensor, db: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients of the factors, in their order, shapes and dtypes, from those of `a` and `b`."""
        alone = len(self.ranks) == 1
        das = (da,) if alone else da.split(self.ranks)
        dbs = (db,) if alone else db.split(self.ranks, 1)
        both = []
        for i, (mine_a, mine_b) in enumerate(zip(das, dbs, strict=True)):
            a, b = self._factors[2 * i], self._factors[2 * i + 1]
            both.append(cast(mine_a, a.dtype).reshape(a.shape))
            # Scaled in the wider of the two dtypes, and rounded once.
            both.append(
                cast(mine_b if self._scalings[i] == 1 else mine_b * self._scalings[i], b.dtype).reshape(b.shape)
            )
        return both


def _matrix(factor: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    scaled = cast(factor if scaling == 1 else factor * scaling, dtype)
    return scaled if scaled.dim() == 2 else scaled.flatten(1)
