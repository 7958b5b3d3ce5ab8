"""How an operation reads a frozen weight: as it is, or with an update already in it.

These are light views made for one call, over the tensors that a base module holds. `weights.store.WeightStore` is the
same idea for everything that happens once: merging, exporting, inspecting.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from ..weights import WeightStore, primitives
from . import kernels
from .autocast import cast, no_autocast

Nested = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class FrozenWeight(Protocol):
    """A weight that is read in forward and again in backward, and never gets a gradient.

    Attributes:
        kept: the stored tensor; autograd keeps it, so that a write to it before backward is noticed.
    """

    @property
    def kept(self) -> torch.Tensor | None: ...  # noqa: D102

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense weight (out, in) or (out, in / groups, *kernel); it may be the stored tensor itself."""
        ...

    def merged(
        self, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor, scaling: float = 1.0, low: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return weight + scaling * b @ a as a new tensor of the weight's shape, rounded once to `dtype`.

        Args:
            dtype: of the result.
            a: (rank, in / groups * prod(kernel)).
            b: (out, rank).
            scaling: factor of the update.
            low: the factors may be rounded to this dtype first; None multiplies them as they are.
        """
        ...


class Dense(NamedTuple):
    """A dense weight. `transposed`: stored as (in, out), as transformers' Conv1D does."""

    weight: torch.Tensor
    transposed: bool = False

    @property
    def kept(self) -> torch.Tensor:
        """The weight."""
        return self.weight

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """See FrozenWeight."""
        weight = cast(self.weight, dtype)
        return weight.t() if self.transposed else weight

    def merged(
        self, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor, scaling: float = 1.0, low: torch.dtype | None = None
    ) -> torch.Tensor:
        """See FrozenWeight."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return _merged(self.read(wide).clone(), dtype, a, b, scaling)


class Packed(NamedTuple):
    """Values in 4 bits as bitsandbytes packs them; `nested` holds maxima, code and offset of the maxima's own blocks."""

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    nested: Nested | None
    blocksize: int
    quant_type: str
    shape: torch.Size

    @property
    def kept(self) -> torch.Tensor:
        """The packed values."""
        return self.packed

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """See FrozenWeight."""
        return primitives.unpack(
            self.packed, self.absmax, self.nested, self.blocksize, self.quant_type, self.shape, dtype
        )

    def merged(
        self, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor, scaling: float = 1.0, low: torch.dtype | None = None
    ) -> torch.Tensor:
        """See FrozenWeight."""
        if kernels.available(self.packed.device, dtype, a.dtype):
            matrix = torch.Size((self.shape[0], self.shape[1:].numel()))
            return kernels.dequantize_merge(
                self.packed,
                self.absmax,
                self.code,
                self.nested,
                self.blocksize,
                self.quant_type,
                matrix,
                cast(a, low or a.dtype),
                cast(b, low or b.dtype),
                scaling,
                dtype,
            ).view(self.shape)
        return _merged(self.read(torch.float32), dtype, a, b, scaling)


class Stored(NamedTuple):
    """A weight in any other format, read through its store."""

    store: WeightStore

    @property
    def kept(self) -> torch.Tensor | None:
        """The module's parameter `weight`, if it has one."""
        return self.store.module._parameters.get("weight")

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """See FrozenWeight."""
        return self.store.read(dtype)

    def merged(
        self, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor, scaling: float = 1.0, low: torch.dtype | None = None
    ) -> torch.Tensor:
        """See FrozenWeight."""
        return _merged(self.store.read(torch.promote_types(self.store.dtype, torch.float32)), dtype, a, b, scaling)


def _merged(fresh: torch.Tensor, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    matrix = fresh if fresh.dim() == 2 else fresh.flatten(1)
    with no_autocast(fresh.device.type):
        matrix.addmm_(cast(b, matrix.dtype), cast(a, matrix.dtype), alpha=scaling)
    return cast(matrix, dtype).view(fresh.shape)  # not `fresh`: the matrix of a channels-last one is a copy
