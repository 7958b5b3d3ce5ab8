"""Builds a small model of every type that transformers registers, on the meta device.

Widths stay as the config class has them: a tensor on the meta device costs nothing, and real widths keep every ratio
(heads, groups, latent sizes) valid. Only the number of layers shrinks, to the first few that show every kind of layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

TASKS = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq-lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image-text-to-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
#: The tasks the sweep must cover; the last one of TASKS is an addition.
REQUIRED_TASKS = ("causal-lm", "seq2seq-lm", "sequence-classification")

_LAYER_COUNT = re.compile(
    r"^(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_(encoder|decoder)_layers|"
    r"(encoder|decoder)_num_hidden_layers|depth|num_blocks|num_self_attends_per_block|num_hidden_groups_layers)$"
)
_LAYER_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "layers_block_types")

_DRAFT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 6,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
#: Config values that a type (or "type/task") needs because its defaults describe no model that can be built, or not the
#: task's model. They hold for the type as a part of another one too.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 1000},  # half a million rows of each hash table would be real memory
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 8}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"n_routed_experts": 8, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    # A draft model has no keys and values of its own: every layer reads those of the model it drafts for.
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_DRAFT}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text", **_DRAFT}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"hidden_size": 64, "kv_channels": 16, "intermediate_size": 64, "vocab_size": 256},
    "led": {"attention_window": 16, "max_encoder_position_embeddings": 256},
    "longformer": {"attention_window": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_shape": [8, 8]},
    "reformer/causal-lm": {"is_decoder": True},
    "t5/sequence-classification": {"decoder_start_token_id": 0},
    "mt5/sequence-classification": {"decoder_start_token_id": 0},
    "umt5/sequence-classification": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 9, "layers_block_type": ["mamba", "mamba", "hybrid"] * 3},
    "zamba2": {"num_hidden_layers": 9, "layers_block_type": ["mamba", "mamba", "hybrid"] * 3},
}


#: Types whose forward pass depends on values: they are traced on the CPU, with real (random) weights.
ON_CPU = ("blt", "jetmoe", "led", "longformer", "xlnet")


@dataclass(frozen=True)
class Case:
    """One registered model: `name` is the model type, `task` a key of TASKS."""

    name: str
    task: str
    class_name: str

    @property
    def device(self) -> str:
        return "cpu" if self.name in ON_CPU else "meta"


def cases(tasks: tuple[str, ...] = REQUIRED_TASKS) -> Iterator[Case]:
    """Yield every registered (type, task) once; a tuple of classes gives its first."""
    for task in tasks:
        for name, classes in TASKS[task].items():
            yield Case(name, task, classes if isinstance(classes, str) else classes[0])


def small_config(model_type: str, task: str, model_class: type[nn.Module] | None = None) -> PreTrainedConfig:
    """Return the type's default config with few layers; the part of it that `model_class` takes, if that is another."""
    config = _shrink(_default(model_type), OVERRIDES.get(f"{model_type}/{task}", {}))
    wanted = getattr(model_class, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in _sub_configs(config) if type(part) is wanted), config)


def _default(model_type: str) -> PreTrainedConfig:
    try:
        return CONFIG_MAPPING[model_type]()
    except Exception:  # some config classes refuse their own defaults
        return CONFIG_MAPPING[model_type](**OVERRIDES.get(model_type, {}))


def _shrink(default: PreTrainedConfig, extra: Mapping[str, Any] = MappingProxyType({})) -> PreTrainedConfig:
    """Rebuild a config from its class's defaults, so that what the class derives from the layer count stays right."""
    layers = _layers_that_show_every_kind(default)
    values: dict[str, Any] = {}
    for key, value in _plain_values(default):
        if isinstance(value, PreTrainedConfig) and key in type(default).sub_configs:
            values[key] = _shrink(value)
        elif _LAYER_COUNT.match(key) and isinstance(value, int) and value >= layers:
            values[key] = layers
    values.update({**OVERRIDES.get(default.model_type, {}), **extra})
    lists = {k: v[:layers] for k, v in _plain_values(default) if k in _LAYER_KINDS and isinstance(v, list)}
    try:
        config = type(default)(**values)
        stale = [k for k, v in lists.items() if k not in values and len(getattr(config, k, None) or v) != len(v)]
    except ValueError:  # the class checks its own default list against the layer count
        stale = list(lists)
        if not stale:
            raise
    else:
        if not stale:
            return config
    return type(default)(**{**{k: lists[k] for k in stale}, **values})


def _plain_values(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    for key in config.to_dict():
        try:
            yield key, getattr(config, key, None)
        except (AttributeError, RuntimeError):  # a value that differs from layer to layer has no global one
            continue


def _layers_that_show_every_kind(config: PreTrainedConfig) -> int:
    count = 2
    for kinds in [value for key, value in _plain_values(config) if key in _LAYER_KINDS]:
        if isinstance(kinds, list) and kinds and all(isinstance(k, str) for k in kinds):
            count = max(count, max(kinds.index(kind) for kind in set(kinds)) + 1)
    return max(count, min(getattr(config, "first_k_dense_replace", 0) or 0, 4) + 1)


def build(case: Case, attention: str = "eager") -> nn.Module:
    """Build the model on the case's device, in training mode. Raises whatever the library raises."""
    model_class = getattr(transformers, case.class_name)
    config = small_config(case.name, case.task, model_class)
    for part in [config, *_sub_configs(config)]:
        part._attn_implementation = attention
    with torch.device(case.device):
        model = model_class(config)
    return model.train()


def _sub_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    for key in type(config).sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            yield part
            yield from _sub_configs(part)
