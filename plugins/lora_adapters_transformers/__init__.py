"""transformers models: the backend, their target maps and the Trainer callback."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .callback import LoraCallback as LoraCallback

__all__ = ["LoraCallback"]


def __getattr__(name: str):
    if name == "LoraCallback":
        from .callback import LoraCallback

        return LoraCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
