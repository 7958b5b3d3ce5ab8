"""What the pipelines do differently: how images become latents, captions become tensors, and what the denoiser is given.

Text goes through the pipeline's own `encode_prompt`, and the denoiser gets what the pipeline's own denoising loop gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_adapters.errors import RequestError, StateError, UnsupportedError

from ..wrappers import plain


class Family:
    """A pipeline as training sees it.

    Attributes:
        pipe: the pipeline.
        denoiser_name: its component that is trained, "unet" or "transformer".
        text_encoder_names: its text encoders that there were when this was made.
        resolution: side in pixels of the square images that the denoiser was made for.
        multiple: sides of images must be multiples of this many pixels.
        patch: side of the square of latents that is one token of a transformer.
        guidance: what a guidance-distilled Flux is told.
    """

    name: ClassVar[str]
    denoiser_name: ClassVar[str] = "unet"
    #: What the pipeline's class is called, at the beginning.
    pipelines: ClassVar[str] = "StableDiffusion"
    #: Encoders without which the pipeline's encode_prompt fails.
    needed: ClassVar[tuple[str, ...]] = ("text_encoder",)
    optional: ClassVar[tuple[str, ...]] = ()
    patch: int = 1
    _takes_guidance = False

    def __init__(self, pipe: Any, guidance: float | None = None) -> None:
        self.pipe = pipe
        self._vae: Any = _vae_config(pipe)
        self.text_encoder_names = [n for n in (*self.needed, *self.optional) if getattr(pipe, n, None) is not None]
        if missing := [n for n in self.needed if n not in self.text_encoder_names]:
            raise UnsupportedError(
                f"This {self.name} pipeline has no {', no '.join(missing)}, and it can't encode prompts without: load it "
                "with all its parts. (SDXL's refiner can't be trained by itself.)"
            )
        self._check()
        if guidance is not None and not self._takes_guidance:
            raise RequestError(
                f"diffusion.guidance is for a Flux that is told its guidance, such as Flux.1-dev, and this {self.name} "
                "is not: leave it out."
            )
        self.guidance = 1.0 if guidance is None else guidance

    @property
    def denoiser(self) -> Any:
        """Return the UNet or transformer as it is called: compiled, if it is."""
        return getattr(self.pipe, self.denoiser_name)

    def models(self) -> nn.ModuleDict:
        """Return the denoiser and the text encoders that are there, by their names in the pipeline."""
        names = (self.denoiser_name, *self.text_encoder_names)
        found = {name: getattr(self.pipe, name) for name in names}
        return nn.ModuleDict({name: plain(model) for name, model in found.items() if model is not None})

    @property
    def config(self) -> Any:
        """Return the denoiser's config."""
        return plain(self.denoiser).config

    @property
    def resolution(self) -> int:
        """Return the side in pixels of the square that has as many pixels as the images the denoiser was made for."""
        size = self.config.sample_size or 64
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return math.isqrt(sides[0] * sides[1]) * self.pipe.vae_scale_factor

    @property
    def multiple(self) -> int:
        """Return the number of pixels that sides of images must be multiples of."""
        return self.pipe.vae_scale_factor * self.patch

    def tokens(self, latents: Tensor) -> int:
        """Return how many tokens a transformer makes of one image's latents; latents (B, C, h, w)."""
        return (latents.shape[-2] // self.patch) * (latents.shape[-1] // self.patch)

    # ---- images ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return mean and std of the VAE's posterior, each (B, C, h, w) float32.

        The VAE computes in float32, whatever its weights' dtype (SDXL's overflows in float16), and row by row: what an
        image gives does not depend on the images beside it.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].

        Raises:
            StateError: the VAE is put away. RequestError: sides are no multiples of `multiple`.
        """
        vae = plain(self._part("vae"))
        if any(side % self.multiple for side in pixels.shape[-2:]):
            raise RequestError(f"{self.name} takes images whose sides are multiples of {self.multiple} pixels.")
        device = _device(vae)
        with _in_float32(vae), torch.autocast(device.type, enabled=False):
            rows = [vae.encode(row[None].to(device, torch.float32)).latent_dist for row in pixels]
        return {"mean": torch.cat([row.mean for row in rows]), "std": torch.cat([row.std for row in rows])}

    def sample(self, moments: dict[str, Tensor], noise: Tensor) -> Tensor:
        """Return latents (B, C, h, w) as the denoiser knows them: drawn from the posterior, shifted and scaled.

        Args:
            moments: what `moments` returned.
            noise: standard normal, of the same shape.
        """
        latents = moments["mean"] + moments["std"] * noise
        return (latents - (self._vae.shift_factor or 0.0)) * self._vae.scaling_factor

    # ---- captions ----------------------------------------------------------------------------------------------------

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return what the denoiser is told of captions, each tensor (B, ...): the pipeline's own encode_prompt.

        Gradients flow to the text encoders where autograd is on. An empty caption is what the pipeline takes for guidance
        when there is no negative prompt.

        Raises:
            StateError: a text encoder is put away.
        """
        encoders = [self._part(name) for name in self.text_encoder_names]
        return self._encode(list(captions), _device(encoders[0]))

    def tokenized(self, caption: str) -> list[Any]:
        """Return what each tokenizer makes of a caption: how it pads, to which length, and the ids."""
        names = [name.replace("text_encoder", "tokenizer") for name in self.text_encoder_names]
        found = [getattr(self.pipe, name) for name in names]
        return [[t.padding_side, t.pad_token_id, t.model_max_length, list(t(caption).input_ids)] for t in found]

    def _encode(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        embeds, _ = self.pipe.encode_prompt(captions, device, 1, False)
        return {"embeds": embeds}

    # ---- the denoiser ------------------------------------------------------------------------------------------------

    def predict(self, latents: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """Return the denoiser's prediction (B, C, h, w) float32.

        Args:
            latents: noisy latents (B, C, h, w).
            timesteps: (B,), in [0, scheduler.config.num_train_timesteps).
            text: what `encode` returned.
            sizes: (B, 6): height and width of the original, top and left of the crop, height and width of what is
                trained on (SDXL, arXiv:2307.01952, sections 2.2 and 2.3).
        """
        dtype = plain(self.denoiser).dtype
        text = {name: value.to(latents.device, dtype) for name, value in text.items()}
        return self._predict(latents.to(dtype), timesteps, text, sizes.to(latents.device)).float()

    def _predict(self, latents: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor) -> Tensor:
        return self.denoiser(latents, timesteps, encoder_hidden_states=text["embeds"], return_dict=False)[0]

    def attention(self) -> AbstractContextManager[None]:
        """Return a context in which the gradients of this denoiser's attention are right."""
        return nullcontext()

    # ---- what is refused ---------------------------------------------------------------------------------------------

    def _part(self, name: str) -> nn.Module:
        found = getattr(self.pipe, name, None)
        if found is None:
            raise StateError(f"The pipeline's {name} is put away, as its results are cached: bring it back first.")
        return found

    def _check(self) -> None:
        config = self.config
        self._check_channels(config.in_channels, config.out_channels)
        told = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
        if strange := [field for field in told if getattr(config, field, None) is not None]:
            raise UnsupportedError(
                f"This UNet is told more than the prompt ({strange[0]}={getattr(config, strange[0])!r}), as those of "
                "upscalers, LCM and image variations are: train the text-to-image model it was made from."
            )

    def _check_channels(self, read: int, made: int | None) -> None:
        wanted = self._vae.latent_channels
        if read != wanted or made not in (None, wanted):
            raise UnsupportedError(
                f"This {self.name} {self.denoiser_name} takes {read} channels and makes {made or read}, and the VAE's "
                f"latents have {wanted}: it is for inpainting, editing, depth or control. Train the text-to-image model."
            )


def _vae_config(pipe: Any) -> Any:
    import diffusers

    vae = plain(getattr(pipe, "vae", None))  # type: ignore[arg-type]
    if not isinstance(vae, diffusers.AutoencoderKL):
        raise UnsupportedError(
            f"Training encodes images with an AutoencoderKL, and this pipeline's VAE is a {type(vae).__name__}: load the "
            "pipeline with the VAE it was trained with."
        )
    return vae.config


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """Within this context the parameters are float32; after it they are the very tensors that they were."""
    kept = [(p, p.data) for p in module.parameters() if p.dtype != torch.float32]
    try:
        for parameter, data in kept:
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
