"""The factors of several adapters as one: A stacked by rows, scaling * B side by side, in the dtype to compute in."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Stack:
    """All adapters of one layer, as two matrices.

    Attributes:
        a: (sum of ranks, in * prod(kernel)).
        b: (out, sum of ranks), scalings included.
        ranks: of each adapter.
    """

    def __init__(self, factors: Sequence[torch.Tensor], scalings: Sequence[float], dtype: torch.dtype) -> None:
        """Stack A_1, B_1, A_2, B_2, ... of shapes (rank, in, *kernel) and (out, rank, 1...)."""
        self._a, self._b, self._scalings = factors[0::2], factors[1::2], scalings
        self.ranks = [a.shape[0] for a in self._a]
        self.each_a = [a.to(dtype).flatten(1) for a in self._a]
        scaled = [(b if s == 1 else b * s).to(dtype).flatten(1) for b, s in zip(self._b, scalings, strict=True)]
        self.a = self.each_a[0] if len(self.each_a) == 1 else torch.cat(self.each_a)
        self.b = scaled[0] if len(scaled) == 1 else torch.cat(scaled, 1)

    def gradients(self, da: torch.Tensor | None, db: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the gradients of the factors, in their order, shapes and dtypes, from those of `a` and `b`."""
        both: list[torch.Tensor | None] = []
        das = [None] * len(self.ranks) if da is None else da.split(self.ranks)
        dbs = db.split(self.ranks, 1)
        for a, b, s, mine_a, mine_b in zip(self._a, self._b, self._scalings, das, dbs, strict=True):
            both.append(None if mine_a is None else mine_a.to(a.dtype).reshape(a.shape))
            both.append((mine_b if s == 1 else mine_b * s).to(b.dtype).reshape(b.shape))
        return both
