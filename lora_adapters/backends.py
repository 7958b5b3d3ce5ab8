"""Which backend serves a model, and what the model is under PEFT's wrappers."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from .errors import LoraAdaptersWarning, PluginError
from .hooks.manager import load_object, plugins, require
from .request import AttachRequest
from .targets import Backend, Classification, ModelInfo

if TYPE_CHECKING:
    from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model under a PeftModel (and under torch.compile), else the model itself."""
    model = getattr(model, "_orig_mod", model)
    if any(cls.__module__.split(".")[0] == "peft" and cls.__name__ == "PeftModel" for cls in type(model).__mro__):
        model = model.get_base_model()  # type: ignore[operator]
    return model


def base_of(module: nn.Module) -> nn.Module:
    """Return the base module under PEFT layers, else the module itself."""
    get_base = getattr(module, "get_base_layer", None)
    return get_base() if callable(get_base) else module  # type: ignore[return-value]


@functools.cache
def foreign_tuner(module_class: type) -> str:
    """Return the name of the PEFT method other than LoRA whose layers are of this class, else ""."""
    for cls in module_class.__mro__:
        if cls.__module__.startswith("peft.tuners.") and cls.__name__.endswith("Layer"):
            method = cls.__module__.split(".")[2]
            if method not in ("lora", "tuners_utils"):
                return method
    return ""


def backend_for(model: nn.Module) -> tuple[Backend, tuple[str, ...]]:
    """Return the backend that knows the model, and notes about the choice."""
    modules = {cls.__module__ for cls in type(model).__mro__}
    for spec in plugins().backends():
        if any(m == p or m.startswith(p + ".") for m in modules for p in spec.module_prefixes):
            try:
                require(spec.requires, spec.extra, f"Backend {spec.name!r}")
                return load_object(spec.target)(), ()
            except Exception as error:
                note = f"backend {spec.name!r} could not be used ({type(error).__name__}: {error})"
                warnings.warn(f"{note}; the generic one serves instead.", LoraAdaptersWarning, stacklevel=2)
    from .generic import GenericBackend

    note = f"no backend knows {type(model).__name__}: the generic PyTorch backend takes layers by their class alone."
    return GenericBackend(), (note,)


def classify(backend: Backend, info: ModelInfo, request: AttachRequest) -> Classification:
    """Return the roles of a model's modules: the backend's, or those of a plugin that resolves targets itself."""
    classes = backend.classify(info, plugins().target_maps())
    answer = plugins().first("lora_adapters_resolve_targets", info=info, request=request)
    if answer is None:
        return classes
    plugin, roles = answer
    if unknown := [name for name in roles if name not in info.modules]:
        raise PluginError(f"Plugin {plugin!r} gave a role to {unknown[0]!r}, which is no layer of this model.")
    note = f"roles from plugin {plugin!r}"
    return replace(classes, roles=dict(roles), notes=(*classes.notes, note), unverified="")
