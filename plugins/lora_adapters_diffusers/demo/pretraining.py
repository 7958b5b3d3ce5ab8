"""How the demo's small Stable Diffusion is pretrained: the autoencoder, then the UNet and the text encoder together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_adapters.cli.demo_training import Clock

from .digits import Digits

if TYPE_CHECKING:
    from .base import BaseSettings

#: Weight of the autoencoder's KL divergence per latent value: enough to keep latents near a unit normal.
_KL = 1e-4
#: Shares of images without a caption, and with the class's; the others are called by their digit.
_UNNAMED, _CLASS = 0.1, 0.3


def train_autoencoder(pipe: Any, digits: Digits, settings: BaseSettings, clock: Clock) -> None:
    """Train pipe.vae to give back images, and set the scaling factor that makes latents' standard deviation 1."""
    vae = pipe.vae

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        pixels = digits.pixels[rows]
        posterior = vae.encode(pixels).latent_dist
        again = vae.decode(posterior.sample(generator)).sample
        return F.mse_loss(again, pixels) + _KL * posterior.kl().mean() / posterior.mean[0].numel()

    _fit([vae], loss, len(digits.pixels), settings.vae_steps, settings.vae_learning_rate, settings, clock)
    vae.register_to_config(scaling_factor=float(1 / _latents(vae, digits).std()))


def train_denoiser(pipe: Any, digits: Digits, captions: Sequence[str], settings: BaseSettings, clock: Clock) -> None:
    """Train pipe.unet and pipe.text_encoder to predict the noise (DDPM, arXiv:2006.11239, eq. 14).

    Args:
        captions: the empty one, the class's, then one for each digit.
    """
    latents = _latents(pipe.vae, digits) * pipe.vae.config.scaling_factor
    ids = pipe.tokenizer(list(captions), padding="max_length", return_tensors="pt").input_ids
    timesteps = pipe.scheduler.config.num_train_timesteps

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.rand(len(rows), generator=generator)
        named = torch.where(drawn < _UNNAMED + _CLASS, 1, digits.classes[rows] + 2)
        caption = torch.where(drawn < _UNNAMED, 0, named)
        noise = torch.randn(latents[rows].shape, generator=generator)
        t = torch.randint(timesteps, (len(rows),), generator=generator)
        noisy = pipe.scheduler.add_noise(latents[rows], noise, t)
        return F.mse_loss(pipe.unet(noisy, t, pipe.text_encoder(ids)[0][caption]).sample, noise)

    models = [pipe.unet, pipe.text_encoder]
    _fit(models, loss, len(latents), settings.steps, settings.learning_rate, settings, clock)


@torch.no_grad()
def _latents(vae: Any, digits: Digits) -> Tensor:
    return vae.encode(digits.pixels).latent_dist.mode()


def _fit(
    models: Iterable[nn.Module],
    loss: Callable[[Tensor, torch.Generator], Tensor],
    rows: int,
    steps: int,
    rate: float,
    settings: BaseSettings,
    clock: Clock,
) -> None:
    """AdamW with a one-cycle learning rate on random rows of the data; gradients are clipped to norm 1."""
    models = list(models)
    parameters = [parameter for model in models for parameter in model.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(steps):
        batch = torch.randint(rows, (settings.batch_size,), generator=generator)
        optimizer.zero_grad()
        loss(batch, generator).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        clock.step(step + 1, steps)
    for model in models:
        model.eval()
