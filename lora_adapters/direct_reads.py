"""Layers whose weight other code reads without calling them: an adapter there would do nothing, and say nothing."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

#: `self.x.weight`, but not a test of its type, nor a look at its dtype, device, shape or other facts, nor a clamp of
#: its data in place.
_WEIGHT_READ = re.compile(
    r"(?<!isinstance\()\bself\.([\w.]+)\.weight\b(?!\.(data\.clamp_|dtype|device|shape|ndim|size|numel|is_|"
    r"requires_grad|data_ptr|element_size|grad))"
)
#: Methods that run when a model is built or tied, not when it computes.
_SETUP = re.compile(r"init|reset|tie|resize|prune|load|convert|set_|get_|quantize|fuse")

_NOTHING = "without calling it, where an adapter would do nothing"


def owners_of(name: str, by_name: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path to the module, ancestor) for every ancestor that is no plain container, the nearest first."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        owner = by_name.get(".".join(parts[:-count]))
        if owner is not None and not isinstance(owner, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield ".".join(parts[-count:]), owner


def why_not_called(module: nn.Module, owners: Iterable[tuple[str, nn.Module]]) -> str:
    """Return "" or, as a reason for the plan, who reads this module's weight without calling it.

    Args:
        module: the layer, without adapters.
        owners: see `owners_of`.
    """
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return f"torch.nn.MultiheadAttention reads its weight {_NOTHING}"
    for path, owner in owners:
        if method := _read_by(type(owner)).get(path):
            return f"{method} reads its weight {_NOTHING}"
    return ""


@functools.cache
def _read_by(owner: type[nn.Module]) -> dict[str, str]:
    """Return path -> method, for the modules whose weight the class's own source reads while it computes."""
    found: dict[str, str] = {}
    for cls in owner.__mro__:
        if cls.__module__.split(".")[0] == "torch":
            break
        for name, method in vars(cls).items():
            if not _SETUP.search(name):
                found |= {match[1]: f"{cls.__name__}.{name}" for match in _WEIGHT_READ.finditer(_source(method))}
    return found


def _source(method: Any) -> str:
    if not inspect.isfunction(method):
        return ""
    try:
        source = inspect.getsource(method)
    except (OSError, TypeError):  # no source on this machine: what is known as data still holds
        return ""
    names = method.__code__.co_varnames
    return re.sub(rf"\b{names[0]}\.", "self.", source) if names else source


def has_fused_layers(model: nn.Module) -> bool:
    """Return True if the model has layers that `keep_called` may have to look after."""
    return any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules())


def keep_called(model: nn.Module) -> None:
    """Make torch.nn.TransformerEncoderLayer call the layers of its feed-forward in evaluation too.

    Without gradients it hands their weights to one fused kernel, which knows neither adapters nor packed weights. It
    leaves that alone when one of its modules has a hook, so those layers get one. An encoder of such layers no longer
    packs padded rows into nested tensors, which only that kernel takes.
    """
    changed: set[int] = set()
    for block in model.modules():
        if isinstance(block, nn.TransformerEncoderLayer):
            for layer in (block.linear1, block.linear2):
                if type(layer) is not nn.Linear:
                    changed.add(id(block))
                    if _nothing not in layer._forward_pre_hooks.values():
                        layer.register_forward_pre_hook(_nothing)
    for encoder in model.modules() if changed else ():
        if isinstance(encoder, nn.TransformerEncoder) and any(id(block) in changed for block in encoder.layers):
            encoder.use_nested_tensor = False


def _nothing(module: nn.Module, inputs: Any) -> None:
    """Be a hook."""
