"""The two protocols that hide how a base weight is stored.

A `WeightStore` is the view of one base module's weight: merge, export, requantize and inspect go through it, so none of
them is written once per layer kind times per quantizer. A `Quantizer` makes base modules in a smaller format and gives
the store of a module it made.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class WeightStore(Protocol):
    """How one base module holds its weight.

    Attributes:
        format: "dense", "nf4", "fp4", "int8" or a plugin's quantizer name.
        module: the base module this store looks at; its own plain forward always works.
    """

    format: str
    module: nn.Module

    @property
    def shape(self) -> torch.Size:
        """Logical shape of the weight: (out, in) for linear, (out, in / groups, *kernel) for conv, (rows, dim) else."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype the module computes in and `read` returns by default."""
        ...

    @property
    def device(self) -> torch.device:
        """Device that holds the stored weight."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes the stored weight takes, statistics included, bias not."""
        ...

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the dense weight of `shape`, detached: a fresh tensor, never a view of what is stored."""
        ...

    def write(self, weight: torch.Tensor) -> None:
        """Store a dense weight of `shape` in place, quantizing it if the format does."""
        ...

    def dense_module(self, weight: torch.Tensor) -> nn.Module:
        """Return a new dense module (nn.Linear, nn.Conv2d, ...) with this weight and the old one's settings and bias.

        The module itself stays as it is.
        """
        ...


@runtime_checkable
class Quantizer(Protocol):
    """Makes base modules that hold their weight in a smaller format."""

    name: str

    def supports(self, module: nn.Module) -> str:
        """Return "" if `quantize` can take this dense module, else the reason it can't (shown in the plan)."""
        ...

    def nbytes(self, shape: torch.Size) -> int:
        """Bytes that a weight of this shape takes once quantized, statistics included. Exact; works without data."""
        ...

    def quantize(self, module: nn.Module, compute_dtype: torch.dtype) -> nn.Module:
        """Return a new module on the same device with the weight quantized. The old module is left as it is.

        On a meta-device module, returns a meta-device module of the right class and sizes.
        """
        ...

    def store(self, module: nn.Module) -> WeightStore | None:
        """Return the store of a module that this quantizer made (or that equals one), else None."""
        ...
