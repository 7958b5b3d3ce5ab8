"""PEFT's own layers with another forward, for models that others adapted. Merging, saving and the rest stay PEFT's code.

A layer becomes one of these by its `__class__` alone, and PEFT's again in the same way.
"""

from __future__ import annotations

from importlib import import_module

from peft.tuners.lora import layer as peft_layers

from .fused import FusedConv, FusedEmbedding, FusedLinear


class Linear(FusedLinear, peft_layers.Linear):
    """PEFT's LoRA on nn.Linear and transformers' Conv1D."""


class Embedding(FusedEmbedding, peft_layers.Embedding):
    """PEFT's LoRA on nn.Embedding."""


class Conv1d(FusedConv, peft_layers.Conv1d):
    """PEFT's LoRA on nn.Conv1d."""


class Conv2d(FusedConv, peft_layers.Conv2d):
    """PEFT's LoRA on nn.Conv2d."""


#: PEFT's module -> ours with classes of the same names. The second imports bitsandbytes, so only a model that holds its
#: layers loads it.
_MODULES = {"peft.tuners.lora.layer": __name__, "peft.tuners.lora.bnb": f"{__name__}_bnb"}


def optimized_class(stock: type) -> type | None:
    """Return the class to give a layer of PEFT's class `stock`; None if there is none, as for any subclass of it."""
    if stock.__module__ not in _MODULES:
        return None
    ours = getattr(import_module(_MODULES[stock.__module__]), stock.__name__, None)
    return ours if ours is not None and stock_class(ours) is stock else None


def stock_class(ours: type) -> type | None:
    """Return PEFT's class under one of these; None if `ours` is another class."""
    return ours.__bases__[1] if ours.__module__ in _MODULES.values() and len(ours.__bases__) == 2 else None
