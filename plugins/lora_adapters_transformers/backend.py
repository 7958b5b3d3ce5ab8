"""The transformers backend: what `lora_adapters.targets.Backend` asks of it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_adapters.hooks.specs import TargetMap
from lora_adapters.targets import Classification, ModelInfo

from . import example_inputs, roles, tasks

if TYPE_CHECKING:
    from lora_adapters.adapter_file import AdapterFile
    from lora_adapters.attach_plan import AttachPlan

    from .liger import LigerKernels


class TransformersBackend:
    """Knows the models of transformers, and models whose classes derive from its PreTrainedModel."""

    name = "transformers"

    def family(self, model: nn.Module) -> str:
        """Return the model's `config.model_type`."""
        return tasks.family(model)

    def classify(self, info: ModelInfo, maps: Iterable[TargetMap]) -> Classification:
        """Return the role of every module, by target maps first, then by structure."""
        return roles.classify(info, maps)

    def task_type(self, model: nn.Module) -> str | None:
        """Return PEFT's task type, such as "CAUSAL_LM"; None if the class does not say."""
        return tasks.task_type(model)

    def heads_to_train(self, model: nn.Module) -> tuple[str, ...]:
        """Return the modules that a task class adds to its base model (a classifier), never a language model head."""
        return tasks.heads_to_train(model)

    def example_inputs(self, model: nn.Module, batch_size: int, sequence_length: int, device: Any) -> dict[str, Any]:
        """Return one training step's keyword arguments; see `example_inputs.example_inputs`."""
        return example_inputs.example_inputs(model, batch_size, sequence_length, device)

    def dense_modules(self, model: nn.Module) -> tuple[str, ...]:
        """Return patterns of modules that transformers itself keeps out of quantization."""
        return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())

    def liger_kernels(self, model: nn.Module, plan: AttachPlan) -> LigerKernels:
        """Return Liger's kernels for a model, not applied yet; see `liger.find_kernels`."""
        from .liger import find_kernels

        return find_kernels(model, plan)

    def unloaded(self, model: nn.Module) -> None:
        """Let a model whose adapters were merged forget the ties between weights that no longer hold."""
        from .tying import forget_broken_ties

        forget_broken_ties(model)

    def can_load(self, name: str, revision: str | None = None) -> bool:
        """Return True if `name` has a configuration that transformers knows."""
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
        """Return a context in which transformers shows its progress bars, or none."""
        from .loading import progress_bars

        return progress_bars(show)

    # ---- merging a saved adapter into a checkpoint: `lora_adapters.merged_checkpoint.MergingBackend` -----------------

    def adapter_options(self, name: str, file: AdapterFile, **options: Any) -> dict[str, Any]:
        """Return the options of `load` that give the model an adapter was trained on; see `merging.adapter_options`."""
        from .merging import adapter_options

        return adapter_options(name, file, **options)

    def new_weights(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the weights of a loaded model that its checkpoint did not hold."""
        from .loading import new_weights

        return new_weights(model)

    def beside(self, name: str, adapter: str, **source: Any) -> dict[str, Path]:
        """Return name -> file of the tokenizer and the processor; see `merging.beside`."""
        from .merging import beside

        return beside(name, adapter, **source)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a plain model as `from_pretrained` reads it."""
        from .merging import save

        save(model, folder)
