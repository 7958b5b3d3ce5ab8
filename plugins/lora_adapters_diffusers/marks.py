"""What diffusers' own methods look for on a model that carries adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from lora_adapters.errors import StateError

if TYPE_CHECKING:
    from lora_adapters.adapter import Adapter

#: Methods that copy the weights of q, k and v into one new layer, which their adapters would not reach.
_FUSING = ("fuse_qkv_projections",)


def mark_denoiser(adapter: Adapter) -> None:
    """Make a diffusers model know that it carries PEFT layers, and refuse what would silently lose them.

    `peft_config` is there already (PEFT sets it); diffusers also asks for `_hf_peft_config_loaded`.
    """
    mark_loaded(adapter)
    for name in _FUSING:
        if hasattr(type(adapter.base), name):
            adapter.mark(name, refuse_fusing)


def mark_loaded(adapter: Adapter) -> None:
    """Tell diffusers' and transformers' methods that the base has a `peft_config`."""
    adapter.mark("_hf_peft_config_loaded", True)


def refuse_fusing(*_: Any, **__: Any) -> NoReturn:
    """Raise, in the place of `fuse_qkv_projections`."""
    raise StateError(
        "fuse_qkv_projections copies the weights of q, k and v into one new layer, which the adapters on them would not "
        "reach: they would be lost without a word. Detach them first, or merge them (adapter.merge(unload=True)); an "
        "adapter attached after fusing sits on the fused layers."
    )
