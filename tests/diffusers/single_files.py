"""Writes a tiny pipeline as one file, in the names that Stable Diffusion was released with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lora_adapters.formats.unet_names import to_ldm

_NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
_VAE = (
    (r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)


def unet_key(key: str, layers: int) -> str:
    """Return the LDM name of a UNet's tensor."""
    name, _, leaf = key.rpartition(".")
    if name == "conv_norm_out":
        return f"out.0.{leaf}"
    if found := re.fullmatch(r"(.+\.resnets\.\d+)\.(norm\d)", name):
        place = to_ldm(f"{found[1]}.conv1", layers).removesuffix("in_layers.2")
        return f"{place}{_NORMS[found[2]]}.{leaf}"
    if found := re.fullmatch(r"(.+\.attentions\.\d+)\.(.+)", name):
        place = to_ldm(f"{found[1]}.proj_in", layers).removesuffix("proj_in")
        return f"{place}{found[2]}.{leaf}"
    return f"{to_ldm(name, layers)}.{leaf}"


def vae_key(key: str, levels: int) -> str:
    """Return the LDM name of an autoencoder's tensor."""
    for pattern, name in _VAE:
        key = re.sub(pattern, name, key)
    if found := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers\.0)", key):
        place = {"resnets": "block", "upsamplers.0": "upsample"}[found[2]]
        key = f"decoder.up.{levels - 1 - int(found[1])}.{place}{key[found.end() :]}"
    return key


def write(pipe: Any, file: Path, extra: dict[str, Any] | None = None) -> Path:
    """Write UNet, autoencoder and the first text encoder of an SD or SDXL pipeline."""
    layers, levels = pipe.unet.config.layers_per_block, len(pipe.vae.config.block_out_channels)
    clip = "conditioner.embedders.0" if "text_encoder_2" in pipe.components else "cond_stage_model"
    tensors = {f"model.diffusion_model.{unet_key(k, layers)}": v for k, v in pipe.unet.state_dict().items()}
    tensors |= {f"first_stage_model.{vae_key(k, levels)}": v for k, v in pipe.vae.state_dict().items()}
    tensors |= {f"{clip}.transformer.text_model.{k}": v for k, v in pipe.text_encoder.state_dict().items()}
    save_file({k: v.contiguous() for k, v in (tensors | (extra or {})).items()}, file)
    return file
