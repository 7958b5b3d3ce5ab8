"""What stands around the models of a pipeline: torch.compile's wrappers and the hooks of offloading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def plain(module: nn.Module) -> nn.Module:
    """Return the model under torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


@contextmanager
def uncompiled(pipe: Any) -> Iterator[None]:
    """Put models in the place of torch.compile's wrappers, which diffusers' methods pass over without a word."""
    parts = {name: getattr(pipe, name, None) for name in pipe._lora_loadable_modules}
    wrapped = {name: module for name, module in parts.items() if hasattr(module, "_orig_mod")}
    for name, module in wrapped.items():
        setattr(pipe, name, plain(module))
    try:
        yield
    finally:
        for name, module in wrapped.items():
            setattr(pipe, name, module)


@contextmanager
def without_offload(pipe: Any) -> Iterator[None]:
    """Take offloading hooks off while layers change, and put them on again, as diffusers does."""
    model, sequential, group = pipe._optionally_disable_offloading(pipe)
    try:
        yield
    finally:
        if model:
            pipe.enable_model_cpu_offload()
        elif sequential:
            pipe.enable_sequential_cpu_offload()
        elif group:
            from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

            for component in pipe.components.values():
                if isinstance(component, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(component)
