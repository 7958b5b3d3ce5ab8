"""diffusers models: the backend, the roles of their modules, and `LoraPipeline` around a loaded pipeline."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import LoraPipeline as LoraPipeline

__all__ = ["LoraPipeline"]


def __getattr__(name: str):
    if name == "LoraPipeline":
        from .pipeline import LoraPipeline

        return LoraPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
