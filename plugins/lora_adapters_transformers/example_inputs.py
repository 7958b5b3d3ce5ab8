"""Keyword arguments of one training step's forward, for planning memory; they work on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .tasks import forward_parameters, task_type, text_config


def example_inputs(model: nn.Module, batch_size: int, sequence_length: int, device: Any) -> dict[str, Any]:
    """Return input_ids, attention_mask and labels (what else the model needs: decoder ids, boxes, pixels, features).

    Integers are int64; input_ids and attention_mask are (batch_size, sequence_length). Text goes in without images for
    a model that takes both: how many image tokens a picture makes is the processor's business.
    """
    config: Any = model.config
    accepted = forward_parameters(model)
    # MusicGen's decoder takes one row per codebook, and labels of another shape.
    codebooks = config.num_codebooks if str(config.model_type).startswith("musicgen") else 1
    shape = (batch_size * codebooks, sequence_length)
    ids = _token_ids(config, shape, device)
    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, Any] = {}
    if "input_ids" in accepted and main in ("input_ids", "inputs"):
        inputs["input_ids"] = ids
    elif "inputs" in accepted:
        inputs["inputs"] = ids
    else:
        inputs[main] = _dense_input(main, config, batch_size, device)
    if "attention_mask" in accepted and main in ("input_ids", "inputs"):
        inputs["attention_mask"] = torch.ones((batch_size, sequence_length), dtype=torch.long, device=device)
    inputs |= _beside_text(model, accepted, batch_size, sequence_length, device)
    if "bbox" in accepted:
        inputs["bbox"] = torch.zeros((*shape, 4), dtype=torch.long, device=device)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted and _needs_decoder_ids(model):
        inputs["decoder_input_ids"] = ids
    if codebooks == 1:
        inputs.update(_labels(model, accepted, ids, device))
    return inputs


def _token_ids(config: Any, shape: tuple[int, int], device: Any) -> Tensor:
    """Return ids that are no special token, each row ending in the one end token that some classifiers look for."""
    text = text_config(config)
    special = [getattr(c, n, None) for c in (config, text) for n in ("pad_token_id", "eos_token_id", "bos_token_id")]
    special += [getattr(config, n, None) for n in ("image_token_id", "video_token_id", "audio_token_id")]
    taken = {t for value in special for t in (value if isinstance(value, list) else [value])}
    vocabulary = int(getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 256)
    plain = next((t for t in range(min(4, vocabulary - 1), vocabulary) if t not in taken), 0)
    ids = torch.full(shape, plain, dtype=torch.long, device=device)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[:, -1] = end
    return ids


def _dense_input(name: str, config: Any, batch_size: int, device: Any) -> Tensor:
    """Return pixels (batch, channels, size, size) or audio features (batch, mel bins, frames) or samples."""
    vision = getattr(config, "vision_config", config)
    if name == "pixel_values":
        size = getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return torch.zeros((batch_size, getattr(vision, "num_channels", 3), height, width), device=device)
    audio = getattr(config, "audio_config", getattr(config, "encoder_config", config))
    if name == "input_features":
        frames = 2 * int(getattr(audio, "max_source_positions", 0) or 1500)
        return torch.zeros((batch_size, int(getattr(audio, "num_mel_bins", 0) or 80), frames), device=device)
    return torch.zeros((batch_size, 16000), device=device)


def _beside_text(
    model: nn.Module, accepted: set[str], batch_size: int, sequence_length: int, device: Any
) -> dict[str, Any]:
    """Return what a few models can't do without beside their text: speech, or another model's keys and values."""
    config: Any = model.config
    if "shared_kv_states" in accepted and hasattr(config, "backbone_hidden_size"):
        # A draft model continues another model's text by one token: from that model's last embedding and hidden state,
        # side by side, and from its keys and values of the whole text.
        size = (batch_size, 1, 2 * config.backbone_hidden_size)
        states = _shared_states(model, batch_size, sequence_length, device)
        return {"inputs_embeds": torch.zeros(size, device=device), "shared_kv_states": states}
    if "input_features" in accepted and hasattr(config, "audio_length_per_tok"):
        # Each text token stands for a stretch of speech, whose features are added to its embedding.
        frames = sequence_length * config.audio_length_per_tok
        return {
            "input_features": torch.zeros((batch_size, config.audio_config.num_mel_bins, frames), device=device),
        }
    return {}


def _shared_states(model: nn.Module, batch_size: int, length: int, device: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return layer type -> keys and values (batch, heads, length, head size), as the attention layers read them."""
    heads: int = text_config(model.config).num_attention_heads
    states = {}
    for module in model.modules():
        attention: Any = module
        if getattr(attention, "is_kv_shared_layer", False):
            shape = (batch_size, heads // attention.num_key_value_groups, length, attention.head_dim)
            states[attention.layer_type] = (torch.zeros(shape, device=device), torch.zeros(shape, device=device))
    return states


def _needs_decoder_ids(model: nn.Module) -> bool:
    return task_type(model) not in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") or "labels" not in forward_parameters(model)


def _labels(model: nn.Module, accepted: set[str], ids: Tensor, device: Any) -> dict[str, Tensor]:
    task = task_type(model)
    one_each = torch.zeros(ids.shape[0], dtype=torch.long, device=device)
    if task == "QUESTION_ANS" and "start_positions" in accepted:
        return {"start_positions": one_each, "end_positions": one_each}
    if "labels" not in accepted:
        return {}
    if task == "SEQ_CLS" or "ForImageClassification" in type(model).__name__:
        return {"labels": one_each}
    return {"labels": torch.zeros_like(ids) if task == "TOKEN_CLS" else ids}
