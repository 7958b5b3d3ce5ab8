"""Writes a tiny pipeline as one file, in the names that Stable Diffusion 1, XL and 3 were released with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
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


_JOINT = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_SD3 = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}


def sd3_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return SD3's transformer in its own names, queries, keys and values in one."""
    state, count, found = model.state_dict(), len(model.transformer_blocks), {}
    found["pos_embed"] = state["pos_embed.pos_embed"]
    for leaf in ("weight", "bias"):
        found |= {f"{theirs}.{leaf}": state[f"{ours}.{leaf}"] for ours, theirs in _SD3.items()}
        for i in range(count):
            block, joint = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
            for names, place in (
                (("to_q", "to_k", "to_v"), "x"),
                (("add_q_proj", "add_k_proj", "add_v_proj"), "context"),
            ):
                parts = [state[f"{block}attn.{name}.{leaf}"] for name in names]
                found[f"{joint}{place}_block.attn.qkv.{leaf}"] = torch.cat(parts)
            for ours, theirs in _JOINT.items():
                if f"{block}{ours}.{leaf}" in state:  # the last block has no context to give on
                    found[f"{joint}{theirs}.{leaf}"] = state[f"{block}{ours}.{leaf}"]
        # diffusers' last norms take scale and shift in the other order.
        for key in (f"joint_blocks.{count - 1}.context_block.adaLN_modulation.1", "final_layer.adaLN_modulation.1"):
            found[f"{key}.{leaf}"] = torch.cat(found[f"{key}.{leaf}"].chunk(2)[::-1])
    return found


def write(pipe: Any, file: Path, extra: dict[str, Any] | None = None) -> Path:
    """Write the denoiser, the autoencoder and, of SD and SDXL, the first text encoder."""
    levels = len(pipe.vae.config.block_out_channels)
    tensors = {f"first_stage_model.{vae_key(k, levels)}": v for k, v in pipe.vae.state_dict().items()}
    if "transformer" in pipe.components:
        tensors |= {f"model.diffusion_model.{k}": v for k, v in sd3_tensors(pipe.transformer).items()}
    else:
        layers = pipe.unet.config.layers_per_block
        clip = "conditioner.embedders.0" if "text_encoder_2" in pipe.components else "cond_stage_model"
        tensors |= {f"model.diffusion_model.{unet_key(k, layers)}": v for k, v in pipe.unet.state_dict().items()}
        tensors |= {f"{clip}.transformer.text_model.{k}": v for k, v in pipe.text_encoder.state_dict().items()}
    save_file({k: v.contiguous() for k, v in (tensors | (extra or {})).items()}, file)
    return file
