"""A small Stable Diffusion, pretrained here on nine of ten handwritten digits and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_adapters.cache_folder import cache_folder
from lora_adapters.cli.demo_training import Clock

from .digits import SIZE, WORDS, Digits
from .pretraining import train_autoencoder, train_denoiser

#: What is said of any digit; it becomes the class prompt.
CLASS_PROMPT = "a photo of a digit"
#: Raise it when code changes what a base of the same settings becomes: those in users' cache folders are then not taken.
_VERSION = 1
#: Written last: a folder without it was not finished.
_DONE = "pretrained.json"


@dataclass(frozen=True)
class BaseSettings:
    """What the base is, and how it is pretrained.

    Attributes:
        unseen: the digit that it never sees.
        vae_widths, widths: channels of the autoencoder's and the UNet's levels.
        vae_steps, steps: of training the autoencoder, then the UNet together with the text encoder.
        seed: of everything random.
    """

    unseen: int = 9
    vae_widths: tuple[int, ...] = (16, 32, 32)
    widths: tuple[int, ...] = (32, 64)
    vae_steps: int = 250
    steps: int = 700
    batch_size: int = 64
    vae_learning_rate: float = 3e-3
    learning_rate: float = 2e-3
    seed: int = 0


def pretrained_base(settings: BaseSettings, train: Digits, clock: Clock) -> Path:
    """Return the folder of the pretrained pipeline, in diffusers' layout; it is made if the cache folder has none.

    Args:
        settings: what to make.
        train: images to learn from; those of the unseen digit are left out.
        clock: times the stages.
    """
    key = json.dumps({**asdict(settings), "version": _VERSION, "torch": torch.__version__}, sort_keys=True)
    folder = cache_folder("demo", f"digits-{hashlib.sha256(key.encode()).hexdigest()[:16]}")
    if (folder / _DONE).is_file():
        return folder
    pipe = build(settings)
    known = train.of([digit for digit in range(len(WORDS)) if digit != settings.unseen])
    with clock.stage("Pretraining the autoencoder"):
        train_autoencoder(pipe, known, settings, clock)
    with clock.stage("Pretraining the UNet and the text encoder"):
        train_denoiser(pipe, known, captions(), settings, clock)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        pipe.save_pretrained(scratch)
        (scratch / _DONE).write_text(key, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def captions() -> list[str]:
    """Return what an image may be called: nothing (for classifier-free guidance), the class, and each digit by its name."""
    return ["", CLASS_PROMPT, *(f"a photo of the digit {word}" for word in WORDS)]


def build(settings: BaseSettings) -> Any:
    """Return a StableDiffusionPipeline with random weights: SD1.5's parts, each in small."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        tokenizer = _tokenizer()
        levels = len(settings.vae_widths)
        vae = diffusers.AutoencoderKL(
            block_out_channels=settings.vae_widths,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=8,
            sample_size=SIZE,
        )
        unet = diffusers.UNet2DConditionModel(
            sample_size=SIZE // 2 ** (levels - 1),
            block_out_channels=settings.widths,
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=64,
            down_block_types=("CrossAttnDownBlock2D",) * len(settings.widths),
            up_block_types=("CrossAttnUpBlock2D",) * len(settings.widths),
        )
        # SD1.5's scheduler.
        scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        pipe = diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,  # type: ignore[arg-type]
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _tokenizer() -> Any:
    """Return a CLIP tokenizer that reads the captions' words whole and any other letter by letter."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in sorted({word for caption in captions() for word in caption.split()}):
        start, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for piece in rest:
            merges.append(f"{start} {piece}")
            start += piece
            pieces.append(start)
    words = ["<|startoftext|>", "<|endoftext|>", *dict.fromkeys(pieces)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, rules = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({piece: i for i, piece in enumerate(words)}), encoding="utf-8")
        rules.write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges), ""]), encoding="utf-8")
        return CLIPTokenizer(str(vocabulary), str(rules), model_max_length=16)
