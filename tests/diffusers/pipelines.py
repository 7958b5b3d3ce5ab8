"""Tiny Stable Diffusion, SDXL, Flux and SD3 pipelines with random weights, built without a network."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from lora_adapters_diffusers import LoraPipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WIDTH = 32
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer of single letters."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=16)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few whole words, with T5's special tokens."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4, "dog": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)


def clip(seed: int, projection: bool = False) -> Any:
    """Return a CLIP text encoder."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=54,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        max_position_embeddings=16,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(seed: int) -> T5EncoderModel:
    """Return a T5 encoder."""
    torch.manual_seed(seed)
    config = T5Config(d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=6, decoder_start_token_id=0)
    return T5EncoderModel(config).eval()


def vae(latent_channels: int, **more: Any) -> diffusers.AutoencoderKL:
    """Return an autoencoder that halves the size once."""
    torch.manual_seed(3)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=latent_channels, sample_size=16, **blocks, **more
    ).eval()


def unet(**more: Any) -> diffusers.UNet2DConditionModel:
    """Return a UNet like SD1.5's, with two levels."""
    torch.manual_seed(4)
    config = dict(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return diffusers.UNet2DConditionModel(**config | more).eval()


def sd() -> diffusers.StableDiffusionPipeline:
    """Return Stable Diffusion 1.5 in small."""
    return diffusers.StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=clip(0),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    """Return SDXL in small, with its two text encoders."""
    denoiser = unet(
        layers_per_block=2,  # kohya's names count on it
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=clip(0),
        text_encoder_2=clip(1, projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=denoiser,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def sd3() -> diffusers.StableDiffusion3Pipeline:
    """Return SD3 in small, with two CLIPs and a T5."""
    torch.manual_seed(4)
    denoiser = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
    ).eval()
    return diffusers.StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(0, projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(1, projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_wide(2),
        tokenizer_3=t5_tokenizer(),
    )


def t5_wide(seed: int) -> T5EncoderModel:
    """Return a T5 encoder as wide as two CLIPs, as SD3's is no narrower than those."""
    torch.manual_seed(seed)
    return T5EncoderModel(T5Config(d_model=2 * WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4, vocab_size=6)).eval()


def flux() -> diffusers.FluxPipeline:
    """Return Flux.1 in small, with a CLIP and a T5."""
    torch.manual_seed(4)
    denoiser = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(0),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(1),
        tokenizer_2=t5_tokenizer(),
        transformer=denoiser,
    )


#: Text encoders that stock diffusers loads adapters for.
ENCODERS = {
    "sd": ["text_encoder"],
    "sdxl": ["text_encoder", "text_encoder_2"],
    "flux": ["text_encoder"],
    "sd3": ["text_encoder", "text_encoder_2"],
}
BUILDERS = {"sd": sd, "sdxl": sdxl, "flux": flux, "sd3": sd3}


def build(kind: str) -> Any:
    """Return a pipeline without progress bars, the same every time."""
    pipe: Any = BUILDERS[kind]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, prompt: str = "a cat", **options: Any) -> torch.Tensor:
    """Return the image (1, 3, 16, 16) of two steps from a fixed seed."""
    with torch.no_grad():
        result = pipe(
            prompt,
            height=16,
            width=16,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5),
            output_type="pt",
            **({"max_sequence_length": 16} if "transformer" in pipe.components else {}),
            **options,
        )
    return result.images


# ---- what the tests do with them -------------------------------------------------------------------------------------


def fill(model, seed=0, size=0.3):
    """Give every B a random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def close(ours, theirs, limit=1e-4):
    difference = (ours - theirs).abs().max().item()
    assert difference < limit, difference


def differs(one, other):
    return (one - other).abs().max().item() > 1e-3


def denoiser_name(pipe):
    return "unet" if "unet" in pipe.components else "transformer"


def trained(kind, **options):
    """Return a LoraPipeline with an adapter on the denoiser and on CLIP, with values."""
    lora = LoraPipeline(build(kind))
    lora.attach(components=[denoiser_name(lora.pipe), *ENCODERS[kind]], **{"rank": 4, **options})
    for seed, name in enumerate(lora.adapters):
        fill(lora.components[name], seed)
    return lora


def two(folder, kind="sd"):
    """Save adapters "a" and "b" as files."""
    for seed, (name, options) in enumerate({"a": dict(alpha=8), "b": dict(rank=2)}.items()):
        lora = LoraPipeline(build(kind))
        lora.attach(**{"rank": 4, **options})
        fill(lora.denoiser, seed)
        lora.save(folder / name)
    return folder / "a", folder / "b"


def predict(pipe, prompt="a cat", seed=7):
    """Return what the denoiser makes of noise and a prompt, as a training step computes it: with gradients."""
    generator = torch.Generator().manual_seed(seed)
    dtype, device, step = pipe.dtype, pipe._execution_device, torch.tensor([300.0])
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    if "unet" in pipe.components:
        text = pipe.encode_prompt(
            prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False, negative_prompt=None
        )
        more = {"text_embeds": text[2], "time_ids": torch.ones(1, 6, device=device)} if len(text) > 2 else None
        sample = noise.to(device, dtype)
        return pipe.unet(sample, step.to(device), encoder_hidden_states=text[0], added_cond_kwargs=more).sample
    if "text_encoder_3" in pipe.components:
        text, _, pooled, _ = pipe.encode_prompt(
            prompt, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=16
        )
        inputs = dict(hidden_states=noise.to(device, dtype), encoder_hidden_states=text, pooled_projections=pooled)
        return pipe.transformer(timestep=step.to(device), **inputs).sample
    text, pooled, text_ids = pipe.encode_prompt(prompt, None, device=device, max_sequence_length=16)
    places = dict(txt_ids=text_ids, img_ids=torch.stack([torch.arange(16.0)] * 3, 1).to(device, dtype))
    inputs = dict(hidden_states=noise.reshape(1, 16, 16).to(device, dtype), timestep=step.to(device) / 1000)
    return pipe.transformer(encoder_hidden_states=text, pooled_projections=pooled, **inputs, **places).sample


def convolutions(kind):
    """Return a request for ranks by role: with convolutions where the denoiser is a UNet."""
    return {"attention": 4, "mlp": 3, **({"conv": 2} if kind in ("sd", "sdxl") else {})}
