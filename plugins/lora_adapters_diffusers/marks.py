"""What diffusers' own methods look for on a model that carries adapters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lora_adapters.errors import StateError
from lora_adapters.inject import adapter_names

if TYPE_CHECKING:
    from lora_adapters.adapter import Adapter

#: The method that copies the weights of q, k and v into one new layer, which their adapters would not reach.
_FUSE = "fuse_qkv_projections"


def mark_denoiser(adapter: Adapter) -> None:
    """Make a diffusers model know that it carries PEFT layers, and refuse what would silently lose them.

    `peft_config` is there already (PEFT sets it); diffusers also asks for `_hf_peft_config_loaded`.
    """
    mark_loaded(adapter)
    if hasattr(type(adapter.base), _FUSE):
        adapter.mark(_FUSE, partial(fuse_unless_adapted, adapter.base))


def mark_loaded(adapter: Adapter) -> None:
    """Tell diffusers' and transformers' methods that the base has a `peft_config`."""
    adapter.mark("_hf_peft_config_loaded", True)


def fuse_unless_adapted(model: Any) -> None:
    """Do what `fuse_qkv_projections` does, in its place, once other code has taken the adapters off.

    Raises:
        StateError: they are still there.
    """
    if adapter_names(model):
        raise StateError(
            "fuse_qkv_projections copies the weights of q, k and v into one new layer, which the adapters on them would "
            "not reach: they would be lost without a word. Detach them first, or merge them "
            "(adapter.merge(unload=True)); an adapter attached after fusing sits on the fused layers."
        )
    getattr(type(model), _FUSE)(model)
