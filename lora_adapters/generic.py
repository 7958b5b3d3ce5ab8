"""The backend for plain PyTorch models that no plugin knows: roles by class alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .direct_reads import owners_of, why_not_called
from .errors import UnsupportedError
from .hooks.specs import TargetMap
from .sharing import other_names
from .targets import Classification, ModelInfo, classify_by_patterns


def _not_called(info: ModelInfo) -> dict[str, str]:
    """Return module name -> who reads its weight without calling it, under whichever of its names."""
    by_name = dict(info.model.named_modules(remove_duplicate=False))
    names = {name: name for name in info.modules} | other_names(info.model)
    found: dict[str, str] = {}
    for spelling, name in names.items():
        if name in info.modules and name not in found:
            layer = getattr(info.modules[name], "base_layer", info.modules[name])
            if reason := why_not_called(layer, owners_of(spelling, by_name)):
                found[name] = reason
    return found


class GenericBackend:
    """Linear layers are "other" (so "all-linear" takes them), convolutions "conv", embeddings "embedding".

    What a layer is for can't be told from its class, so an output layer is adapted like any other: leave it out with
    `exclude=`, or train it whole with `modules_to_save=`.
    """

    name = "generic"
    #: Convolutions are quantized too: in a model of unknown kind they may hold most of the weights.
    quantized_roles = ("other", "conv")

    def family(self, model: nn.Module) -> str:
        """Return the model's class name."""
        return type(model).__name__

    def classify(self, info: ModelInfo, maps: Iterable[TargetMap]) -> Classification:
        """Return roles by class; a TargetMap(backend="generic", families=(class name,)) comes first."""
        known = classify_by_patterns(info, [m for m in maps if m.backend == self.name])
        roles = {name: self._role(module) for name, module in info.modules.items()} | dict(known.roles)
        default = known.default if known.roles else ""
        if not default:
            default = "all-linear" if "other" in roles.values() else "conv"
        never = _not_called(info) | dict(known.never)
        return Classification(roles, never, default, known.notes)

    @staticmethod
    def _role(module: nn.Module) -> str:
        base = getattr(module, "base_layer", module)
        if isinstance(base, nn.Embedding):
            return "embedding"
        return "conv" if isinstance(base, (nn.Conv1d, nn.Conv2d)) else "other"

    def task_type(self, model: nn.Module) -> None:
        """Return None: PEFT's plain PeftModel serves any module."""

    def heads_to_train(self, model: nn.Module) -> tuple[str, ...]:
        """Return nothing: which module is new can't be told."""
        return ()

    def example_inputs(self, model: nn.Module, batch_size: int, sequence_length: int, device: Any) -> dict[str, Any]:
        """Raise: what a model of unknown kind takes can't be told."""
        raise UnsupportedError(
            f"What {type(model).__name__} takes as input is not known, so its activation memory can't be predicted: "
            "call lora_adapters.memory.predict_step(model, inputs) with inputs of yours."
        )

    def can_load(self, name: str, revision: str | None = None) -> bool:
        """Return False: only frameworks with a hub can load by name."""
        return False

    def load(self, name: str, **options: Any) -> nn.Module:
        """Raise: only frameworks with a hub can load by name."""
        raise UnsupportedError(f"No backend can load {name!r}. Build the model yourself and call attach on it.")
