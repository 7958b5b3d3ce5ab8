"""The pipelines that DreamBooth knows: Stable Diffusion 1.x and 2.x, SDXL, Stable Diffusion 3 and Flux.1."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_adapters.errors import UnsupportedError

from ..wrappers import plain
from .family import Family


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    name = "Stable Diffusion"


class StableDiffusionXL(Family):
    """SDXL's base model."""

    name = "SDXL"
    pipelines = "StableDiffusionXL"
    needed = ("text_encoder", "text_encoder_2")

    def sample(self, moments: dict[str, Tensor], noise: Tensor) -> Tensor:
        """Return latents as the denoiser knows them; see `Family.sample`. Some variants scale each channel by itself."""
        mean, std = getattr(self._vae, "latents_mean", None), getattr(self._vae, "latents_std", None)
        if mean is None or std is None:
            return super().sample(moments, noise)
        latents = moments["mean"] + moments["std"] * noise
        shift, scale = (torch.tensor(value).to(latents).view(1, -1, 1, 1) for value in (mean, std))
        return (latents - shift) * self._vae.scaling_factor / scale

    def _encode(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
        if self.pipe.config.force_zeros_for_empty_prompt:
            said = torch.tensor([caption != "" for caption in captions], device=embeds.device)
            embeds = torch.where(said[:, None, None], embeds, 0.0)
            pooled = torch.where(said[:, None], pooled, 0.0)
        return {"embeds": embeds, "pooled": pooled}

    def _predict(self, latents: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        told = {"text_embeds": text["pooled"], "time_ids": sizes.to(text["embeds"].dtype)}
        options = dict(encoder_hidden_states=text["embeds"], added_cond_kwargs=told)
        return self.denoiser(latents, timesteps, **options, return_dict=False)[0]

    def _check(self) -> None:
        super()._check()
        config = self.config
        pooled = plain(self.pipe.text_encoder_2).config.projection_dim
        if config.projection_class_embeddings_input_dim != pooled + 6 * config.addition_time_embed_dim:
            raise UnsupportedError(
                "This UNet is not told original size, crop and target size, as SDXL's base model is (the refiner is told "
                "an aesthetic score): train the base model."
            )


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5; the T5 may be missing, as in its pipeline."""

    name = "Stable Diffusion 3"
    denoiser_name = "transformer"
    pipelines = "StableDiffusion3"
    needed = ("text_encoder", "text_encoder_2")
    optional = ("text_encoder_3",)

    def __init__(self, pipe: Any, guidance: float | None = None) -> None:
        super().__init__(pipe, guidance)
        self.patch = self.config.patch_size
        self.max_sequence_length = _longest(pipe, "tokenizer_3")

    def _encode(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            captions,
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds, "pooled": pooled}

    def _predict(self, latents: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        told = dict(encoder_hidden_states=text["embeds"], pooled_projections=text["pooled"])
        return self.denoiser(hidden_states=latents, timestep=timesteps, **told, return_dict=False)[0]

    def _check(self) -> None:
        self._check_channels(self.config.in_channels, self.config.out_channels)


class Flux(Family):
    """Flux.1: guidance-distilled (dev) or not (schnell)."""

    name = "Flux.1"
    denoiser_name = "transformer"
    pipelines = "Flux"
    needed = ("text_encoder", "text_encoder_2")
    patch = 2

    def __init__(self, pipe: Any, guidance: float | None = None) -> None:
        super().__init__(pipe, guidance)
        self.max_sequence_length = _longest(pipe, "tokenizer_2")

    @property
    def resolution(self) -> int:
        """Return the side of the images that the pipeline makes: the config has none."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    @property
    def _takes_guidance(self) -> bool:
        return bool(self.config.guidance_embeds)

    def _encode(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        longest = self.max_sequence_length
        embeds, pooled, _ = self.pipe.encode_prompt(captions, device=device, max_sequence_length=longest)
        return {"embeds": embeds, "pooled": pooled}

    def _predict(self, latents: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        rows, channels, height, width = latents.shape
        place = dict(device=latents.device, dtype=latents.dtype)
        guidance = torch.full((rows,), self.guidance, device=latents.device) if self._takes_guidance else None
        made = self.denoiser(
            hidden_states=self.pipe._pack_latents(latents, rows, channels, height, width),
            timestep=timesteps.to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["embeds"],
            txt_ids=torch.zeros(text["embeds"].shape[1], 3, **place),
            img_ids=_image_ids(height // 2, width // 2, **place),
            return_dict=False,
        )[0]
        scale = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(made, height * scale, width * scale, scale)

    def attention(self) -> AbstractContextManager[None]:
        """Return a context without cuDNN's attention, which torch prefers on Hopper. On an H200 with torch 2.11 its backward
        pass for this transformer ends in an illegal memory access at real sizes and gives NaN at tiny ones, without any
        adapter; with torch's other kernels it does not, nor does that of SD3 or SD (compare pytorch/pytorch#196678).
        """
        return _without_cudnn_attention()

    def _check(self) -> None:
        made = self.config.out_channels
        self._check_channels(self.config.in_channels // 4, made and made // 4)


def family_of(pipe: Any, guidance: float | None = None) -> Family:
    """Return a pipeline's family.

    Args:
        pipe: a pipeline of Stable Diffusion 1.x, 2.x, 3.x, SDXL or Flux.1, or a subclass; adapters, 4 bits and compiled
            parts are no hindrance.
        guidance: what a guidance-distilled Flux is told in training; None is 1.

    Raises:
        UnsupportedError: another pipeline, one for inpainting, editing or control, or one with parts missing.
        RequestError: guidance for a model that is told none.
    """
    found = _family_class(pipe)
    names = [cls.__name__ for cls in type(pipe).__mro__]
    if found is None or not any(n.startswith(found.pipelines) and n.endswith("Pipeline") for n in names):
        raise UnsupportedError(
            f"DreamBooth knows the pipelines of Stable Diffusion 1.x, 2.x, 3.x, SDXL and Flux.1, and not a "
            f"{type(pipe).__name__}. Attach to its denoiser with lora_adapters.attach and train it in a loop of your own."
        )
    return found(pipe, guidance)


def _family_class(pipe: Any) -> type[Family] | None:
    import diffusers

    unet, transformer = (plain(getattr(pipe, name, None)) for name in ("unet", "transformer"))  # type: ignore[arg-type]
    if isinstance(transformer, diffusers.SD3Transformer2DModel):
        return StableDiffusion3
    if isinstance(transformer, diffusers.FluxTransformer2DModel):
        return Flux
    if isinstance(unet, diffusers.UNet2DConditionModel):
        return {None: StableDiffusion, "text_time": StableDiffusionXL}.get(unet.config.addition_embed_type)
    return None


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def _image_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return what the pipeline's `_prepare_latent_image_ids` makes, (height * width, 3), made on the device itself: a copy
    from the CPU can't be recorded as a CUDA graph.
    """
    axes = [torch.arange(length, device=device, dtype=dtype) for length in (1, height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def _longest(pipe: Any, tokenizer: str) -> int:
    """Return T5's tokens: as many as the pipeline takes when nothing is said, and no more than the tokenizer makes."""
    usual = inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default
    found = getattr(pipe, tokenizer, None)
    return usual if found is None else min(usual, found.model_max_length)
