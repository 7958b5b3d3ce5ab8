"""The factors of several adapters as one: A stacked by rows, B side by side, in the dtype to compute in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .autocast import cast


class Stack:
    """All adapters of one layer, as two matrices.

    Attributes:
        a: (sum of ranks, in * prod(kernel)).
        b: (out, sum of ranks).
        ranks: of each adapter.
    """

    __slots__ = ("_factors", "_scalings", "a", "b", "each_a", "ranks")

    def __init__(self, factors: Sequence[torch.Tensor], scalings: Sequence[float], dtype: torch.dtype) -> None:
        """Stack A_1, B_1, A_2, B_2, ... of shapes (rank, in, *kernel) and (out, rank, 1...)."""
        self._factors, self._scalings = factors, scalings
        self.each_a = [_matrix(a, dtype) for a in factors[0::2]]
        each_b = [_matrix(b, dtype) for b in factors[1::2]]
        self.ranks = [a.shape[0] for a in self.each_a]
        self.a = self.each_a[0] if len(each_b) == 1 else torch.cat(self.each_a)
        self.b = each_b[0] if len(each_b) == 1 else torch.cat(each_b, 1)

    def scaled(self, columns: torch.Tensor, groups: int = 1, ranks: Sequence[int] | None = None) -> torch.Tensor:
        """Return (n, groups * ranks, ...) with each adapter's columns times its scaling.

        What is scaled is a product, as in PEFT: scaling B, which is tiny at first, would lose bits of it in fp16.

        Args:
            columns: each group holds every adapter's columns, in order.
            groups: how many.
            ranks: columns of each adapter in a group; None means its rank.
        """
        if all(s == self._scalings[0] for s in self._scalings):
            return columns if self._scalings[0] == 1 else columns * self._scalings[0]
        parts = columns.unflatten(1, (groups, -1)).split(list(ranks or self.ranks), 2)
        return torch.cat([part * s for part, s in zip(parts, self._scalings, strict=True)], 2).flatten(1, 2)

    @property
    def scaled_b(self) -> torch.Tensor:
        """B with the scalings, in fp32 at least: what is put into a weight."""
        return self.scaled(self.b.to(torch.promote_types(self.b.dtype, torch.float32)))

    def gradients(self, da: torch.Tensor, db: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients of the factors, in their order, shapes and dtypes.

        Args:
            da: the gradient of `a`.
            db: the gradient of `b`, but for the scalings.
        """
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


def _matrix(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    factor = cast(factor, dtype)
    return factor if factor.dim() == 2 else factor.flatten(1)
