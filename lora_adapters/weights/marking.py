"""What transformers, accelerate and PEFT look at to learn that a model is quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .bnb_quantizers import Bnb4bit, Int8
from .dense import is_transposed
from .store import Quantizer

_ABSENT = object()


def _is_pretrained(model: nn.Module) -> bool:
    return any(c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers") for c in type(model).__mro__)


def mark_quantized(
    model: nn.Module, quantizer: Quantizer, compute_dtype: torch.dtype | None = None
) -> Callable[[], None]:
    """Set the flags that from_pretrained sets on a model it quantizes with bitsandbytes. Call it after quantizing.

    On a transformers model: is_quantized, quantization_method, hf_quantizer, is_loaded_in_4bit or _8bit, and the
    config's quantization_config, so that Trainer accepts the model and save_pretrained writes what from_pretrained
    reads back (linear layers only: stock transformers knows no 4-bit convolution). On any other model only
    is_loaded_in_4bit or is_loaded_in_8bit, which PEFT reads. For quantizers other than bitsandbytes' nothing is set,
    because every one of these flags promises bitsandbytes layers.

    Args:
        model: the model, its modules already quantized.
        quantizer: the quantizer that did it.
        compute_dtype: what the layers compute in, for the config.

    Returns:
        A function that puts every flag back as it was.
    """
    if not isinstance(quantizer, (Bnb4bit, Int8)):
        return lambda: None
    changes: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        changes.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    put(model, "is_loaded_in_4bit" if isinstance(quantizer, Bnb4bit) else "is_loaded_in_8bit", True)
    if _is_pretrained(model):
        config, hf_quantizer = _hf_objects(model, quantizer, compute_dtype)
        put(model, "is_quantized", True)
        put(model, "quantization_method", config.quant_method)
        put(model, "hf_quantizer", hf_quantizer)
        put(model.config, "quantization_config", config)
        configs = {id(m.config): m.config for m in model.modules() if _is_pretrained(m)}
        for module_config in configs.values():
            put(module_config, "_is_quantized", True)

    def undo() -> None:
        for owner, name, before in reversed(changes):
            if before is not _ABSENT:
                setattr(owner, name, before)
            elif name in vars(owner):
                delattr(owner, name)

    return undo


def _hf_objects(model: nn.Module, quantizer: Bnb4bit | Int8, compute_dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Return transformers' config and quantizer object for what was done to the model."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    # from_pretrained quantizes every nn.Linear and Conv1D it isn't told to skip.
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear or is_transposed(module)]
    settings: dict[str, Any] = {"llm_int8_skip_modules": dense}
    if isinstance(quantizer, Bnb4bit):
        settings |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantizer.quant_type,
            "bnb_4bit_use_double_quant": quantizer.nested,
            "bnb_4bit_quant_storage": quantizer.quant_storage,
            "bnb_4bit_compute_dtype": quantizer.compute_dtype or compute_dtype,
        }
    else:
        settings |= {"load_in_8bit": True, "llm_int8_threshold": quantizer.threshold}
    config = BitsAndBytesConfig(**settings)
    return config, AutoHfQuantizer.from_config(config, pre_quantized=False)
