"""Whether a base class multiplies its input by its weight, found out by running its forward once without data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..weights import store_for
from ..weights.deferred import Product, deferred


class _Watched:
    """Notes what is done with a weight; see `weights.deferred.Source`."""

    inputs: Sequence[torch.Tensor] = ()

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.products, self.others = weight, 0, 0
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device

    def product(self, call: Product) -> torch.Tensor | None:
        """Count a product, and let it be computed from the values."""
        self.products += 1
        return None

    def values(self) -> torch.Tensor:
        """Count a use of the values."""
        self.others += 1
        return self.weight

    def gradients(self, gradient: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """Return nothing."""
        return ()


def multiplies_its_input(base: nn.Module) -> bool:
    """Return True if all that a base's own forward does with its weight is one F.linear or convolution.

    Such a forward can drop inputs of the adapter; one that computes with the weight itself (standardises it) can't. It
    runs on the meta device, on a copy. A forward that takes more than an input, or data, counts as the latter.
    """
    store = store_for(base)
    if store is None:
        return False
    if store.format != "dense":
        base = store.dense_module(torch.empty(store.shape, dtype=store.dtype, device="meta"))
    twin = copy.copy(base)
    source = _Watched(torch.empty(store.shape, dtype=store.dtype, device="meta"))
    for kind in ("_parameters", "_buffers"):
        tensors = vars(base)[kind]
        vars(twin)[kind] = {n: None if t is None else t.detach().to("meta") for n, t in tensors.items()}
    if isinstance(base, nn.Linear):
        shape: tuple[int, ...] = (2, base.in_features)
    else:
        conv: Any = base
        size = [2 * d * k for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        shape = (2, conv.in_channels, *size)
    try:
        with torch.no_grad():
            twin._parameters["weight"] = deferred(source)  # type: ignore[assignment]
            twin.forward(torch.empty(shape, dtype=store.dtype, device="meta"))
    except Exception:
        return False
    # A product that is computed from the values uses them once.
    return source.products == source.others == 1
