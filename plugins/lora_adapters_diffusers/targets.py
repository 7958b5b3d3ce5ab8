"""Roles of diffusers' modules as data: where a module is says what it is for, the end of its name which one it is.

A module's place (attention, mlp, norm, ...) is said by the class of its nearest telling ancestor. diffusers names the
projections of its denoisers alike nearly everywhere, so a few rules serve them all; what they can't know is a TargetMap.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lora_adapters.hooks.specs import TargetMap

#: Place -> class names of the modules that make it. The nearest ancestor with an entry decides; first match wins.
PLACES: tuple[tuple[str, str], ...] = (
    ("time", r"Timestep\w*Embed(ding|der)?s?$|TimeEmbed(ding|der)?s?$"),
    ("other", r"Embed(?!.*(Block|Transformer)\b)|Projector$|Proj(ection)?$|Approximator|Conditioner|FaceEncoder"),
    ("head", r"FinalLayer$|^Head$|OutLayer(Audio)?$|LastLayer$|FinalBlock$|ConvMlmLayer"),
    ("norm", r"Norm|Modulation|AdaLN|FiLM"),
    ("resnet", r"Res(net|Net|Conv)?\w*Block|Downsample|Upsample|TemporalConvLayer|Kandinsky3Block"),
    ("attention", r"(Attention|Attn)(?!.*(Block|Model|Pool2d)$)|LiteLA"),
    ("mlp", r"FeedForward|MLP|Mlp|SwiGLU|GEGLU|^GELU$|LinearActivation|DenseGatedAct|GLUMB|Transition$|Expert"),
    ("router", r"MoE\w*(Layer|Gate)|Router"),
)

#: Names of projections inside attention, searched in the end of the name; first match wins.
ATTENTION_LEAVES: tuple[tuple[str, str], ...] = (
    ("qkv", r"(^|[._])qkv(_proj|_mlp_proj)?$"),
    ("kv", r"(^|[._])(to_kv|kv_linear|kv_proj)$|^(img|txt)_kv_proj$|to_added_kv$"),
    ("qkv", r"to_added_qkv$"),
    ("q", r"(^|\.)(to_q|to_query|query|q_linear|add_q_proj|q_proj(_cam)?)(_t)?$"),
    ("k", r"(^|\.)(to_k|to_key|key|k_linear|add_k_proj|k_proj(_cam)?)(_t)?$"),
    ("v", r"(^|\.)(to_v|to_value|value|v_linear|add_v_proj|v_proj(_cam)?)(_t)?$"),
    (
        "o",
        r"(^|\.)(to_out(_t|\.\d+)?|to_add_out|out_layer|c_proj|proj(_attn)?|out_proj(_cam)?|(img|txt)_attn_proj)$",
    ),
)

#: Names that say "feed-forward" in a block that holds its own.
MLP_NAMES = (
    r"(^|\.)(proj_mlp|ff_in|ff_out|gate_proj|up_proj|down_proj|pwconv\d|channelwise_linear_\d)$"
    r"|(^|\.)(ffn?|feed_forward|channelwise)\.\d+$|(^|\.)single_\w+\.\d+\.proj_out$"
)
#: Names of layers, beside the time embedding's own, that read it.
TIME_NAMES = r"(^|\.)(time_emb_proj|time_proj)$"
#: The last layer of a block that runs attention and feed-forward side by side takes both of their results.
PARALLEL_BLOCK = r"Single\w*Block$"

#: Names, directly under the model, of what turns latents into features, and features into the prediction.
INPUT_NAMES = (
    r"^(conv_in|img_in|x_embedders?|all_x_embedder|proj_in|proj_in_conv|audio_proj_in|patchify_proj|input_proj|"
    r"patch_embed(?!\.text_proj)|\w*patch_embedding|patch_(short|mid|long)|pos_embed|latent_embed|visual_embeddings|"
    r"audio_embeddings|preprocess_conv|image_latents_proj_in|continuous_inputs_projection|embedding|embed_tokens)(\.|$)"
)
OUTPUT_NAMES = (
    r"^(conv_out|proj_out(_\d)?|audio_proj_out|postprocess_conv|clf|lm_head|audio_heads|final_linear|spec_out|"
    r"output_layer|final_layer\.linear|proj_to_clip_embeddings|project_from_hidden|sequence_readout|local_latents_linear)"
    r"(\.|$)"
)

#: What diffusers' own training scripts adapt: to_q, to_k, to_v, to_out.0, and the second stream's projections.
DEFAULT = "attention"

#: The families named here are those whose adapters other tools know; the rest go by the same rules.
TARGET_MAPS: tuple[TargetMap, ...] = (
    TargetMap("diffusers", ("*",), default=DEFAULT),
    # The last layer is part of the last norm.
    TargetMap("diffusers", ("Lumina2Transformer2DModel", "LuminaNextDiT2DModel"), {"head": (r"^norm_out\.linear_2$",)}),
    # SD 1.x, 2.x and SDXL.
    TargetMap(
        "diffusers",
        ("UNet2DConditionModel",),
        roles={
            "embedding": (r"^conv_in$",),
            "head": (r"^conv_out$",),
            "q": (r"\.attn[12]\.to_q$",),
            "k": (r"\.attn[12]\.(to_k|add_k_proj)$",),
            "v": (r"\.attn[12]\.(to_v|add_v_proj)$",),
            "o": (r"\.attn[12]\.to_out\.0$",),
            "mlp": (r"\.ff\.net\.(0\.proj|2)$",),
            "conv": (r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut)$", r"\.(down|up)samplers\.\d+\.conv$"),
            "time": (r"\.time_emb_proj$", r"^(time|add)_embedding\.linear_\d$"),
            "other": (r"\.attentions\.\d+\.proj_(in|out)$",),
        },
        default=DEFAULT,
    ),
    # SD3 and SD3.5: two streams; attn2 is the latents' own attention in 3.5 medium.
    TargetMap(
        "diffusers",
        ("SD3Transformer2DModel",),
        roles={
            "embedding": (r"^pos_embed\.proj$",),
            "head": (r"^proj_out$",),
            "q": (r"\.attn2?\.(to_q|add_q_proj)$",),
            "k": (r"\.attn2?\.(to_k|add_k_proj)$",),
            "v": (r"\.attn2?\.(to_v|add_v_proj)$",),
            "o": (r"\.attn2?\.(to_out\.0|to_add_out)$",),
            "mlp": (r"\.(ff|ff_context)\.net\.(0\.proj|2)$",),
            "time": (r"^time_text_embed\.(timestep|guidance)_embedder\.",),
            "other": (r"norm\w*\.linear$", r"^context_embedder$", r"^time_text_embed\.text_embedder\."),
        },
        default=DEFAULT,
    ),
    # Flux.1: double blocks as SD3's; a single block's proj_out takes attention and feed-forward in one.
    TargetMap(
        "diffusers",
        ("FluxTransformer2DModel",),
        roles={
            "embedding": (r"^x_embedder$",),
            "head": (r"^proj_out$",),
            "q": (r"\.attn\.(to_q|add_q_proj)$",),
            "k": (r"\.attn\.(to_k|add_k_proj)$",),
            "v": (r"\.attn\.(to_v|add_v_proj)$",),
            "o": (r"\.attn\.(to_out\.0|to_add_out)$",),
            "mlp": (r"\.(ff|ff_context)\.net\.(0\.proj|2)$", r"^single_transformer_blocks\.\d+\.proj_(mlp|out)$"),
            "time": (r"^time_text_embed\.(timestep|guidance)_embedder\.",),
            "other": (r"norm\w*\.linear$", r"^context_embedder$", r"^time_text_embed\.text_embedder\."),
        },
        default=DEFAULT,
    ),
)


def place_of(class_names: Iterable[str]) -> str:
    """Return the place of a module, from the classes of its ancestors, the nearest first; "" if none of them says."""
    for class_name in class_names:
        for place, pattern in PLACES:
            if re.search(pattern, class_name):
                return place
    return ""


def attention_role(name: str) -> str:
    """Return the role that the end of a name says inside attention, or ""."""
    return next((role for role, pattern in ATTENTION_LEAVES if re.search(pattern, name)), "")
