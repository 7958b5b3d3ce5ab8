"""What stands around the models of a pipeline: torch.compile's wrappers and the hooks of offloading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from lora_adapters.errors import UnsupportedError


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


def onloaded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of LoraPipeline run under `without_offload`."""

    @wraps(method)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        with without_offload(self.pipe):
            return method(self, *args, **options)

    return run


@contextmanager
def without_offload(pipe: Any) -> Iterator[None]:
    """Take offloading hooks off while layers change or are read, and put them on again.

    Under sequential offloading the weights are on the meta device between calls: there is nothing to read or to fuse.
    What `accelerate.dispatch_model` put on a model that is in memory stays.

    Raises:
        UnsupportedError: the weights are on the disk. Nothing is changed.
    """
    with _without_groups(pipe), _without_accelerate(pipe):
        yield


@contextmanager
def _without_accelerate(pipe: Any) -> Iterator[None]:
    """Take accelerate's offloading off, model by model or layer by layer.

    Not by `pipe._optionally_disable_offloading`: after it one has to enable offloading anew for the whole pipeline, on
    the device that diffusers would choose.
    """
    from accelerate import cpu_offload
    from accelerate.hooks import CpuOffload, remove_hook_from_module

    hooks = {part: part._hf_hook for part in _models(pipe) if hasattr(part, "_hf_hook")}
    whole = {part: hook.execution_device for part, hook in hooks.items() if isinstance(hook, CpuOffload)}
    layered = {part: device for part in hooks if (device := _offloaded_to(part)) is not None}
    for part in (*whole, *layered):
        remove_hook_from_module(part, recurse=part in layered)
    try:
        yield
    finally:
        if whole:
            pipe.enable_model_cpu_offload(device=getattr(pipe, "_offload_device", None) or next(iter(whole.values())))
        for part, device in layered.items():
            cpu_offload(part, device, offload_buffers=len(part._parameters) > 0)  # as diffusers calls it


def _offloaded_to(model: nn.Module) -> Any:
    """Return the device on which a model's layers compute, if accelerate keeps their weights elsewhere; or None."""
    hooks = (getattr(layer, "_hf_hook", None) for layer in model.modules())
    parts = (part for hook in hooks if hook is not None for part in getattr(hook, "hooks", (hook,)))
    return next((part.execution_device for part in parts if getattr(part, "offload", False)), None)


def _models(pipe: Any) -> list[nn.Module]:
    return [plain(part) for part in pipe.components.values() if isinstance(part, nn.Module)]


@contextmanager
def _without_groups(pipe: Any) -> Iterator[None]:
    """Take the hooks of group offloading off, which hold the tensors and the forwards of the layers that there were."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks import group_offloading as groups

    hooks = [(model, groups._get_top_level_group_offload_hook(model)) for model in _models(pipe)]
    configs = [(model, hook.config) for model, hook in hooks if hook is not None]
    if any(config.offload_to_disk_path for _, config in configs):
        raise UnsupportedError(
            "The weights are on the disk (enable_group_offload with offload_to_disk_path), where they can't be read or "
            "changed. Attach, load and fuse first, and offload then."
        )
    for model, _ in configs:
        for name in (groups._GROUP_OFFLOADING, groups._LAYER_EXECUTION_TRACKER, groups._LAZY_PREFETCH_GROUP_OFFLOADING):
            HookRegistry.check_if_exists_or_initialize(model).remove_hook(name, recurse=True)
        for layer in model.modules():
            _forget_registry(layer)
    try:
        yield
    finally:
        for model, config in configs:
            groups._apply_group_offloading(model, config)


def _forget_registry(layer: nn.Module) -> None:
    """Take away what is left on a layer without hooks: a copy of the layer would put its next hooks on this one."""
    registry = vars(layer).get("_diffusers_hook")
    if registry is not None and not registry.hooks:
        del layer._diffusers_hook
        forward = vars(layer).get("forward")
        if getattr(forward, "__func__", None) is type(layer).forward:
            del layer.forward
