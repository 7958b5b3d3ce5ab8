"""Layers that stay dense when a model is stored in 4 bits."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lora_adapters.targets import candidates

#: Below this many values a layer stays dense: 4 bits would save less than 8 KiB of a 16-bit weight.
TINY = 4096


def dense_layers(model: nn.Module) -> Iterator[str]:
    """Yield the names of depthwise convolutions and tiny layers.

    A depthwise convolution (groups == in_channels > 1) holds few values of high rank each: no family has 4 % of its
    weights in them, and a filter of 9 values shares its scale with others. Heads and patch embeddings stay dense by their
    role, not here.
    """
    for name, module in candidates(model).items():
        base = getattr(module, "get_base_layer", lambda module=module: module)()
        depthwise = getattr(base, "groups", 1) == getattr(base, "in_channels", 0) > 1
        if depthwise or base.weight.numel() < TINY:
            yield name
