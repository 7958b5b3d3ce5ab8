"""The diffusers backend: what `lora_adapters.targets.Backend` asks of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_adapters.errors import UnsupportedError
from lora_adapters.hooks.specs import TargetMap
from lora_adapters.targets import Classification, ModelInfo

from . import roles

if TYPE_CHECKING:
    import torch


class DiffusersBackend:
    """Knows the models of diffusers: UNets, DiTs and every other denoiser by structure."""

    name = "diffusers"
    #: Convolutions hold two thirds of the weights of SD1.5's UNet. What reads latents and what makes the prediction
    #: ("embedding" and "head": conv_in, conv_out, proj_out) stay dense.
    quantized_roles = ("q", "k", "v", "o", "qkv", "kv", "mlp", "conv", "time", "other")

    def family(self, model: nn.Module) -> str:
        """Return the model's class name."""
        return type(model).__name__

    def classify(self, info: ModelInfo, maps: Iterable[TargetMap]) -> Classification:
        """Return the role of every module, by target maps first, then by structure."""
        return roles.classify(info, maps)

    def task_type(self, model: nn.Module) -> None:
        """Return None: PEFT has no task type for images, its plain PeftModel serves."""

    def heads_to_train(self, model: nn.Module) -> tuple[str, ...]:
        """Return nothing: a denoiser has no new head."""
        return ()

    def dense_modules(self, model: nn.Module) -> tuple[str, ...]:
        """Return patterns of modules that stay dense: those diffusers itself keeps in fp32, and all of an autoencoder."""
        if "Autoencoder" in type(model).__name__ or type(model).__name__.startswith(("VQModel", "VAE")):
            return (r".*",)
        return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())

    def example_inputs(self, model: nn.Module, batch_size: int, sequence_length: int, device: Any) -> dict[str, Any]:
        """Return one training step's keyword arguments; see `example_inputs.example_inputs`."""
        from .example_inputs import example_inputs

        return example_inputs(model, batch_size, device)

    def spread_inputs(self, model: nn.Module, example: dict[str, Any]) -> list[dict[str, Any]]:
        """Return an example at several timesteps; see `example_inputs.spread`."""
        from .example_inputs import spread

        return spread(example)

    def can_load(self, name: str, revision: str | None = None) -> bool:
        """Return True if `name` is a folder with the config of one diffusers model."""
        from .loading import model_class

        return model_class(name, revision) is not None

    def load(
        self,
        name: str,
        *,
        quantization: Any = None,
        dtype: torch.dtype | str = "auto",
        device: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> nn.Module:
        """Load one model (not a pipeline) by folder or name, quantized if asked; see `loading.load`."""
        from .loading import load

        if trust_remote_code:
            raise UnsupportedError("diffusers models are classes of the package: there is no remote code to trust.")
        return load(name, quantization=quantization, dtype=dtype, device=device, revision=revision, **options)
