"""Inputs of one training step, to predict its memory: the shapes that the model's own resolution gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_adapters.errors import UnsupportedError

#: Tokens of a CLIP prompt, and of a T5 prompt as the pipelines pad it.
CLIP_TOKENS, SD3_T5_TOKENS, FLUX_T5_TOKENS = 77, 256, 512


def example_inputs(
    model: nn.Module, batch_size: int, device: Any, latents: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return keyword arguments of the forward of a UNet (SD 1.x, 2.x, XL), of SD3 or of Flux.1.

    Args:
        model: the denoiser.
        batch_size: images.
        device: where the tensors go.
        latents: (height, width) of the latents; None: the config's `sample_size`, and those of a 1024 px image for Flux,
            which has none.

    Raises:
        UnsupportedError: what other classes take is not known here.
    """
    make = _MAKERS.get(type(model).__name__)
    if make is None:
        raise UnsupportedError(
            f"What {type(model).__name__} takes as input is not known here, so its activation memory can't be predicted: "
            "call lora_adapters.memory.predict_step(model, inputs) with inputs of yours."
        )
    config: Any = model.config

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, device=device)

    timestep = torch.full((batch_size,), 500, device=device)
    return make(config, normal, timestep, latents or _own_size(config))


def _own_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "sample_size", 128) or 64
    return (size, size) if isinstance(size, int) else tuple(size)


def _unet(
    config: Any, normal: Callable[..., torch.Tensor], timestep: torch.Tensor, size: tuple[int, int]
) -> dict[str, Any]:
    inputs: dict[str, Any] = {"sample": normal(config.in_channels, *size), "timestep": timestep}
    if (width := getattr(config, "cross_attention_dim", None)) is not None:
        width = width if isinstance(width, int) else width[0]
        inputs["encoder_hidden_states"] = normal(CLIP_TOKENS, width)
    if getattr(config, "addition_embed_type", None) == "text_time":
        ids = 6
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": normal(pooled), "time_ids": normal(ids)}
    return inputs


def _sd3(
    config: Any, normal: Callable[..., torch.Tensor], timestep: torch.Tensor, size: tuple[int, int]
) -> dict[str, Any]:
    return {
        "hidden_states": normal(config.in_channels, *size),
        "encoder_hidden_states": normal(CLIP_TOKENS + SD3_T5_TOKENS, config.joint_attention_dim),
        "pooled_projections": normal(config.pooled_projection_dim),
        "timestep": timestep,
    }


def _flux(
    config: Any, normal: Callable[..., torch.Tensor], timestep: torch.Tensor, size: tuple[int, int]
) -> dict[str, Any]:
    tokens = (size[0] // 2) * (size[1] // 2)  # a token is 2 x 2 latents
    axes = len(config.axes_dims_rope)
    inputs = {
        "hidden_states": normal(tokens, config.in_channels),
        "encoder_hidden_states": normal(FLUX_T5_TOKENS, config.joint_attention_dim),
        "pooled_projections": normal(config.pooled_projection_dim),
        "timestep": timestep / 1000,
        "img_ids": torch.zeros(tokens, axes, device=timestep.device),
        "txt_ids": torch.zeros(FLUX_T5_TOKENS, axes, device=timestep.device),
    }
    return inputs | ({"guidance": torch.ones_like(inputs["timestep"])} if config.guidance_embeds else {})


_MAKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
