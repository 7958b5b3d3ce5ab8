"""DreamBooth at SD1.5's 512 px and SDXL's 1024 px: a step's time and the peak of memory, diffusers' way and ours.

    python benchmarks/dreambooth.py [--models sd15 sdxl] [--variants ...] [--steps 25] [--rounds 3] [--json]

Random weights of the true shapes, batch 1, rank 16 on attention, AdamW, gradient checkpointing, bf16 (fp32 on a CPU, where
small shapes run, and the peak is the whole process's). "diffusers" is what its scripts do
(examples/dreambooth/train_dreambooth_lora*.py): stock PEFT layers with adapters in fp32, the VAE (SDXL's in fp32) at every
step; SD1.5's script also runs the text encoder at every step, SDXL's encodes the prompt once. "ours" is
LoraPipeline.dreambooth with its defaults: latents and text are encoded once, and on a GPU steps are CUDA graphs.
Variants run in turn in each round; the first round is not counted. A step's time is the median over stretches of five
steps, without the first stretch, in which graphs are recorded and kernels chosen, and without saving. The peak is that of
the tensors of training steps, not of encoding; "reserved" is what the allocator held at most while training and measuring.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from interleaved import median, ratio, tell
from lora_adapters_diffusers import LoraPipeline
from PIL import Image
from torch import nn
from unet import sd15, sdxl, tiny

from lora_adapters.runs.measured import PeakMemory

PROMPT = "a photo of sks dog"
RANK = 16
#: Name -> how the UNet is stored, what is asked for.
VARIANTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "diffusers": (None, {}),
    "ours": (None, {}),
    "ours, NF4": ("nf4", {}),
    "ours, no graphs": (None, {"cuda_graphs": False}),
}
#: Steps of a stretch that is timed.
STRETCH = 5


@dataclass(frozen=True)
class Shape:
    """A pipeline's true shape: denoiser, (hidden, layers, heads, projection) of text encoders, pixels a side."""

    title: str
    unet: Callable[[], nn.Module]
    encoders: tuple[tuple[int, int, int, int | None], ...]
    vae: tuple[int, ...]
    side: int


_VAE = (128, 256, 512, 512)
SHAPES = {
    "sd15": Shape("SD1.5, 512 px", sd15, ((768, 12, 12, None),), _VAE, 512),
    "sdxl": Shape("SDXL, 1024 px", sdxl, ((768, 12, 12, None), (1280, 32, 20, 1280)), _VAE, 1024),
    "tiny": Shape("tiny, 64 px", tiny, ((64, 2, 2, None),), (32, 64), 64),
}


def tokenizer() -> Any:
    """Return a CLIP tokenizer that reads letter by letter."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)


def encoder(hidden: int, layers: int, heads: int, projection: int | None) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection or hidden,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def pipeline(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """Return a stock pipeline with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    torch.manual_seed(0)
    with torch.device(device):
        blocks = len(shape.vae)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=shape.vae,
            layers_per_block=2 if blocks == 4 else 1,
            latent_channels=4,
            force_upcast=len(shape.encoders) == 2,
        )
        parts: dict[str, Any] = {"unet": shape.unet(), "vae": vae, "text_encoder": encoder(*shape.encoders[0])}
        if len(shape.encoders) == 2:
            parts["text_encoder_2"] = encoder(*shape.encoders[1])
    parts = {name: part.to(dtype).eval() for name, part in parts.items()}
    parts |= {"scheduler": DDIMScheduler(), "tokenizer": tokenizer()}
    if len(shape.encoders) == 2:
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer(), add_watermarker=False)
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
    )


def photos(side: int, count: int = 4) -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


@dataclass(frozen=True)
class Run:
    """Seconds of a step, bytes of tensors at the peak, bytes that the allocator held at most."""

    seconds: float
    peak: int
    reserved: int


def run_of(times: list[float], peak: int, device: str) -> Run:
    """Return a run of the times at the end of each stretch of steps."""
    steps = [(after - before) / STRETCH for before, after in pairwise(times)]
    return Run(statistics.median(steps), peak, torch.cuda.max_memory_reserved() if device == "cuda" else peak)


def stock(pipe: Any, images: list[Image.Image], steps: int, device: str, options: dict[str, Any]) -> Run:
    """Train as diffusers' scripts do."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    is_xl = hasattr(pipe, "text_encoder_2")
    unet, dtype = pipe.unet, pipe.unet.dtype
    for part in (unet, pipe.vae, pipe.text_encoder, *([pipe.text_encoder_2] if is_xl else [])):
        part.requires_grad_(False)
    names = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=names))
    cast_training_params(unet, dtype=torch.float32)
    unet.enable_gradient_checkpointing()
    unet.train()
    if is_xl:
        pipe.vae.to(torch.float32)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    pixels = [torch.from_numpy(np.array(i)).permute(2, 0, 1)[None].float() / 127.5 - 1 for i in images]
    added: dict[str, Any] = {}
    text = None
    if is_xl:
        with torch.no_grad():
            text, _, pooled, _ = pipe.encode_prompt(PROMPT, PROMPT, device, 1, False)
        side = images[0].width
        added = {
            "text_embeds": pooled,
            "time_ids": torch.tensor([[side, side, 0, 0, side, side]], device=device).to(dtype),
        }
        for part in (pipe.text_encoder, pipe.text_encoder_2):
            part.to("cpu")

    def step(number: int) -> None:
        with torch.no_grad():
            image = pixels[number % len(pixels)].to(device, pipe.vae.dtype)
            latents = pipe.vae.encode(image).latent_dist.sample() * pipe.vae.config.scaling_factor
            latents = latents.to(dtype)
            told = text if is_xl else pipe.encode_prompt(PROMPT, device, 1, False)[0]
        noise = torch.randn_like(latents)
        at = torch.randint(0, 1000, (1,), device=device)
        noisy = pipe.scheduler.add_noise(latents, noise, at)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype != torch.float32):
            predicted = unet(noisy, at, told, added_cond_kwargs=added or None).sample
        nn.functional.mse_loss(predicted.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    memory = PeakMemory(torch.device(device))
    times = []
    for number in range(1, steps + 1):
        step(number)
        if number % STRETCH == 0:
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
    return run_of(times, memory.read()["peak"], device)


def ours(pipe: Any, images: list[Image.Image], steps: int, device: str, options: dict[str, Any]) -> Run:
    """Train with LoraPipeline.dreambooth."""
    with tempfile.TemporaryDirectory() as folder:
        result = LoraPipeline(pipe).dreambooth(
            images,
            prompt=PROMPT,
            steps=steps,
            output=f"{folder}/run",
            rank=RANK,
            resolution=images[0].width,
            gradient_checkpointing=True,
            log_every=STRETCH,
            save_every=steps,
            samples={"count": 0},
            min_side=8,
            quiet=True,
            **options,
        )
        assert result.folder is not None
        rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    times = [row["step"] / row["images_per_second"] for row in rows if "loss" in row and row["step"] % STRETCH == 0]
    return run_of(times, result.facts.memory_measured["peak"], device)


def measure(shape: Shape, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one shape."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    images, rounds = photos(shape.side, 1), []
    runs: dict[str, Run] = {}
    for turn in range(args.rounds + 1):
        for name in args.variants if turn % 2 else reversed(args.variants):
            pipe = pipeline(shape, args.device, dtype)
            stored, options = VARIANTS[name]
            if stored:
                LoraPipeline(pipe, quantization={"unet": stored})
            train = stock if name == "diffusers" else ours
            runs[name] = train(pipe, images, max(args.steps if turn else 0, 2 * STRETCH), args.device, options)
            del pipe
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
        rounds.append({name: run.seconds for name, run in runs.items()})
    rounds = rounds[1:]
    return [
        {
            "pipeline": shape.title,
            "variant": name,
            "ms/step": 1000 * median(rounds, name),
            "/ diffusers": ratio(rounds, name, "diffusers") if "diffusers" in args.variants else None,
            "peak GiB": runs[name].peak / 2**30,
            "reserved GiB": runs[name].reserved / 2**30,
        }
        for name in args.variants
    ]


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["sd15", "sdxl"] if cuda else ["tiny"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the tables")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers_logging.set_verbosity_error()
    tell([partial(measure, SHAPES[name], args) for name in args.models], args.device, args.json)


if __name__ == "__main__":
    main()
