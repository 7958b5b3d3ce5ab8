"""Tiny single-file checkpoints of Stable Diffusion 1, 2, XL and 3, named as released: what UIs load, made from a pipeline.

Written independently of lora_adapters.formats, by inverting diffusers' own converters; stock `from_single_file(path,
config=folder)` reads them. Every name of a released checkpoint is there but for EMA copies and the noise schedule.
"""

import re

import torch

_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def sdxl(tiny):
    """SDXL in small with encoders of different widths, by which stock diffusers tells them apart in a file.

    Args:
        tiny: the module tests/diffusers/pipelines.py.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    pipe = tiny.sdxl()
    pipe.set_progress_bar_config(disable=True)
    narrow, wide = tiny.WIDTH, 48
    torch.manual_seed(1)
    config = pipe.text_encoder_2.config.to_dict() | {"hidden_size": wide, "projection_dim": wide}
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval()
    denoiser = tiny.unet(
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=wide + 6 * 8,
        cross_attention_dim=narrow + wide,
        use_linear_projection=True,
    )
    pipe.register_modules(text_encoder_2=encoder, unet=denoiser)
    return pipe


def sd2(tiny):
    """Stable Diffusion 2 in small: linear projections; its text encoder is written with OpenCLIP's names."""
    pipe = tiny.sd()
    pipe.set_progress_bar_config(disable=True)
    pipe.register_modules(unet=tiny.unet(layers_per_block=2, use_linear_projection=True))
    return pipe


def write(pipe, path, family="sd1", dtype=None, metadata=None):
    """Write a pipeline as one file and return its tensors by name.

    Args:
        pipe: a StableDiffusionPipeline, StableDiffusionXLPipeline or StableDiffusion3Pipeline.
        path: the file, ".safetensors".
        family: "sd1", "sd2", "sdxl", or "sd3" (whose text encoders are left out).
        dtype: of the floating tensors; None keeps them.
        metadata: entries of the header.
    """
    from safetensors.torch import save_file

    tensors = {key: value.to(dtype or value.dtype) for key, value in released(pipe, family).items()}
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return tensors


def released(pipe, family):
    """Return a pipeline's tensors by the names of the checkpoint that its family was released in."""
    found = {}
    if family == "sd3":
        found |= {f"model.diffusion_model.{name}": value for name, value in _sd3(pipe.transformer).items()}
    else:
        layers = pipe.unet.config.layers_per_block
        attends = {name for name, _ in pipe.unet.named_modules()}
        for name, value in pipe.unet.state_dict().items():
            found[f"model.diffusion_model.{_unet_name(name, layers, attends)}"] = value
    levels = len(pipe.vae.config.block_out_channels)
    for name, value in pipe.vae.state_dict().items():
        square = ".attentions." in name and value.dim() == 2
        found[f"first_stage_model.{_vae_name(name, levels)}"] = value[:, :, None, None] if square else value
    first, second = pipe.text_encoder, getattr(pipe, "text_encoder_2", None)
    if family == "sd1":
        found |= _clip(first, "cond_stage_model.transformer.")
    elif family == "sd2":
        found |= _open_clip(first, "cond_stage_model.model.")
    elif family == "sdxl":
        found |= _clip(first, "conditioner.embedders.0.transformer.")
        found |= _open_clip(second, "conditioner.embedders.1.model.")
    return found


def _unet_name(name, layers, modules):
    module, _, tensor = name.rpartition(".")
    if module in _UNET:
        return f"{_UNET[module]}.{tensor}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", module):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{_RESNET.get(found[3], found[3])}.{tensor}"
    half, block, kind, layer, part = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", module).groups()
    start = int(block) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{start + layers + 1}.0.op.{tensor}"
    if kind == "upsamplers":
        place = 2 if f"up_blocks.{block}.attentions" in modules else 1
        return f"output_blocks.{start + layers}.{place}.conv.{tensor}"
    place = int(kind == "attentions")
    where = f"input_blocks.{start + int(layer) + 1}" if half == "down" else f"output_blocks.{start + int(layer)}"
    return f"{where}.{place}.{_RESNET.get(part, part) if kind == 'resnets' else part}.{tensor}"


def _vae_name(name, levels):
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name):
        return f"{found[1]}.mid.attn_1.{_VAE[found[2]]}.{found[3]}"
    return name


def _long(name):
    """Return a name of CLIP's with the `text_model.` that transformers 5 leaves out in one class."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


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
_SD3_PLACES = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}


def _sd3(model):
    """Return SD3's transformer in its own names, queries, keys and values in one."""
    state, count, found = model.state_dict(), len(model.transformer_blocks), {}
    found["pos_embed"] = state["pos_embed.pos_embed"]
    for leaf in ("weight", "bias"):
        found |= {f"{theirs}.{leaf}": state[f"{ours}.{leaf}"] for ours, theirs in _SD3_PLACES.items()}
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


def _clip(model, prefix):
    return {prefix + _long(name): value for name, value in model.state_dict().items()}


def _open_clip(model, prefix):
    outer = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    state = {_long(name): value for name, value in model.state_dict().items()}
    found = {prefix + outer[name]: value for name, value in state.items() if name in outer}
    if "text_projection.weight" in state:
        found[prefix + "text_projection"] = state["text_projection.weight"].T
    for name, value in state.items():
        inside = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if not inside:
            continue
        layer, part, tensor = inside.groups()
        there = f"{prefix}transformer.resblocks.{layer}"
        if part in _OPEN_CLIP:
            found[f"{there}.{_OPEN_CLIP[part]}.{tensor}"] = value
        elif part == "self_attn.q_proj":
            three = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"{there}.attn.in_proj_{tensor}"] = torch.cat(three)
    return found
