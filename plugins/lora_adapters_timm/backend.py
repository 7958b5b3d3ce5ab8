"""The timm backend: what `lora_adapters.targets.Backend` asks of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_adapters.hooks.specs import TargetMap
from lora_adapters.targets import Classification, ModelInfo

from . import roles
from .dense import dense_layers
from .heads import classifiers
from .inputs import images

if TYPE_CHECKING:
    from lora_adapters.adapter_file import AdapterFile


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

    # ---- loading by name, and merging a saved adapter (`lora_adapters.merged_checkpoint.MergingBackend`) --------------

    def can_load(self, name: str, revision: str | None = None) -> bool:
        """Return True if timm registers `name`, or it is a folder or a Hub name with timm's config."""
        from .loading import can_load

        return can_load(name, revision=revision)

    def skeleton(self, name: str, **options: Any) -> nn.Module:
        """Return the model that `load` would load, without weights; see `loading.skeleton`."""
        from .loading import skeleton

        return skeleton(name, **options)

    def load(self, name: str, **options: Any) -> nn.Module:
        """Load a model; see `loading.load`."""
        from .loading import load

        return load(name, **options)

    def progress_bars(self, show: bool) -> AbstractContextManager[None]:
        """Return a context in which downloads show their progress bars, or none."""
        from .loading import progress_bars

        return progress_bars(show)

    def adapter_options(self, name: str, file: AdapterFile, **options: Any) -> dict[str, Any]:
        """Return the options of `load` that give the model an adapter was trained on; see `loading.adapter_options`."""
        from .loading import adapter_options

        return adapter_options(name, file, **options)

    def new_weights(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the weights of a loaded model that its checkpoint did not hold."""
        from .loading import new_weights

        return new_weights(model)

    def beside(self, name: str, adapter: str, **source: Any) -> dict[str, Path]:
        """Return nothing: how to prepare images is in the config that `save` writes."""
        return {}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a plain model as timm reads it; see `merged.write_files`."""
        from .merged import write_files
        from .own_keys import plain_state

        write_files(model, plain_state(model), folder)
