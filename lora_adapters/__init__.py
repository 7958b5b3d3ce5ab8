"""LoRA for every PyTorch model a person already has. Importing this package imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .api import attach as attach
    from .api import load as load
    from .api import plan as plan
    from .api import restore as restore
    from .cuda_graphs import GraphedLoss as GraphedLoss
    from .errors import LoraAdaptersError as LoraAdaptersError
    from .formats.conversion import convert as convert
    from .hooks import hookimpl as hookimpl
    from .merged_checkpoint import merge_checkpoint as merge_checkpoint
    from .optimization import optimize as optimize

__version__ = "0.1.0"

_LAZY = {
    "Adapter": "adapter",
    "GraphedLoss": "cuda_graphs",
    "LoraAdaptersError": "errors",
    "attach": "api",
    "convert": "formats.conversion",
    "hookimpl": "hooks",
    "load": "api",
    "merge_checkpoint": "merged_checkpoint",
    "optimize": "optimization",
    "plan": "api",
    "restore": "api",
}
__all__ = [
    "Adapter",
    "GraphedLoss",
    "LoraAdaptersError",
    "__version__",
    "attach",
    "convert",
    "hookimpl",
    "load",
    "merge_checkpoint",
    "optimize",
    "plan",
    "restore",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
