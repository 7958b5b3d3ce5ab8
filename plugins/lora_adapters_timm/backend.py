"""The timm backend: what `lora_adapters.targets.Backend` asks of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_adapters.errors import RequestError
from lora_adapters.hooks.specs import TargetMap
from lora_adapters.targets import Classification, ModelInfo

from . import roles
from .dense import dense_layers
from .heads import classifiers
from .inputs import images


class TimmBackend:
    """Knows every model of timm."""

    name = "timm"
    #: Convolutions hold most of the weights of half of timm's families.
    quantized_roles = ("q", "k", "v", "o", "qkv", "kv", "mlp", "conv", "other")

    def family(self, model: nn.Module) -> str:
        """Return the model's class name."""
        return type(model).__name__

    def classify(self, info: ModelInfo, maps: Iterable[TargetMap]) -> Classification:
        """Return the role of every module; see `roles.classify`."""
        return roles.classify(info, maps)

    def task_type(self, model: nn.Module) -> None:
        """Return None: PEFT has no task type for images, its plain PeftModel serves."""

    def heads_to_train(self, model: nn.Module) -> tuple[str, ...]:
        """Return the model's classifiers, which are trained and saved whole."""
        return classifiers(model)

    def example_inputs(self, model: nn.Module, batch_size: int, sequence_length: int, device: Any) -> dict[str, Any]:
        """Return a batch of images of the size that the model was made for; see `inputs.image_shape`."""
        return {"x": images(model, batch_size, device)}

    def dense_modules(self, model: nn.Module) -> tuple[str, ...]:
        """Return the layers that are not worth 4 bits; see `dense.dense_layers`."""
        return tuple(rf"{re.escape(name)}$" for name in dense_layers(model))

    def can_load(self, name: str, revision: str | None = None) -> bool:
        """Return True if `name` is a model that timm registers."""
        import timm

        return timm.is_model(name)

    def load(self, name: str, **options: Any) -> nn.Module:
        """Load a model by name. Raise RequestError if timm registers none of this name."""
        import timm

        if not self.can_load(name):
            raise RequestError(f"timm has no model {name!r}: timm.list_models() says which there are.")
        return timm.create_model(name)
