"""transformers' TimmWrapper models: a timm model inside, under the name `timm_model`.

The backend is the one of timm, with its names prefixed. So the classifier is a head here as there: not quantized, and
trained whole instead of wrapped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_adapters.errors import UnsupportedError
from lora_adapters.hooks.specs import TargetMap
from lora_adapters.targets import Classification, ModelInfo

from .backend import TimmBackend

_PREFIX = "timm_model."


class TimmWrapperBackend(TimmBackend):
    """Knows transformers' TimmWrapperModel and TimmWrapperForImageClassification; transformers loads them."""

    name = "timm-wrapper"

    def family(self, model: nn.Module) -> str:
        """Return the class name of the timm model inside."""
        return super().family(_inside(model))

    def classify(self, info: ModelInfo, maps: Iterable[TargetMap]) -> Classification:
        """Return the roles that the modules have in the timm model."""
        modules = {name.removeprefix(_PREFIX): module for name, module in info.modules.items()}
        found = super().classify(replace(info, backend="timm", modules=modules, model=_inside(info.model)), maps)
        kept = {f: _prefixed(getattr(found, f)) for f in ("roles", "never", "parts", "reads")}
        return replace(found, **kept)

    def heads_to_train(self, model: nn.Module) -> tuple[str, ...]:
        """Return the classifiers."""
        return tuple(_PREFIX + name for name in super().heads_to_train(_inside(model)))

    def example_inputs(self, model: nn.Module, batch_size: int, sequence_length: int, device: Any) -> dict[str, Any]:
        """Return a batch of images, with labels where the model takes them."""
        inputs = {"pixel_values": super().example_inputs(_inside(model), batch_size, sequence_length, device)["x"]}
        if "Classification" in type(model).__name__:
            inputs["labels"] = torch.zeros(batch_size, dtype=torch.long, device=device)
        return inputs

    def dense_modules(self, model: nn.Module) -> tuple[str, ...]:
        """Return the layers that are not worth 4 bits."""
        return tuple(rf"timm_model\.{name}" for name in super().dense_modules(_inside(model)))

    def can_load(self, name: str, revision: str | None = None) -> bool:
        """Return False: the transformers backend loads them."""
        return False

    def load(self, name: str, **options: Any) -> nn.Module:
        """Raise: the transformers backend loads them."""
        raise UnsupportedError(
            f"{name!r}: transformers loads its TimmWrapper models: lora_adapters.load(...) does it so."
        )


def _inside(model: Any) -> nn.Module:
    return model.timm_model


def _prefixed(names: Any) -> dict[str, Any]:
    return {_PREFIX + name: value for name, value in names.items()}
