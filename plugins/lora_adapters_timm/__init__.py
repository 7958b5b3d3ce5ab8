"""timm models: the backend, the roles of their modules, the model wrapper and the image-classification task."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import TimmLoraModel as TimmLoraModel

__all__ = ["TimmLoraModel"]


def __getattr__(name: str):
    if name == "TimmLoraModel":
        from .model import TimmLoraModel

        return TimmLoraModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
