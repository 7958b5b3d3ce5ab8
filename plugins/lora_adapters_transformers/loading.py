"""Loads transformers models, quantized by transformers' own loading, after checking that they fit in memory."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from lora_adapters.attach_plan import AttachPlan
from lora_adapters.device import pick_device
from lora_adapters.error_text import did_you_mean, first_line
from lora_adapters.errors import LoraAdaptersError, RequestError, UnsupportedError
from lora_adapters.hooks.manager import require
from lora_adapters.inject import quantize
from lora_adapters.planning import make_plan
from lora_adapters.preflight import check_load
from lora_adapters.quantized import quantized_layers
from lora_adapters.request import AttachRequest
from lora_adapters.weights import guard_cpu_repacking

#: Task -> the Auto class that loads a model with the right head.
TASKS: Mapping[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "reward": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "image-text-to-text": "AutoModelForImageTextToText",
    "feature-extraction": "AutoModel",
}
#: Formats that transformers quantizes while it reads the weights.
_WHILE_READING = ("nf4", "fp4", "int8")

#: Model that `load` returned -> names of the weights its checkpoint did not hold.
_new_weights: weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]] = weakref.WeakKeyDictionary()


def load(
    name: str,
    *,
    quantization: Any,
    dtype: torch.dtype | str,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
    task: str | None = None,
    ignore_mismatched_sizes: bool = False,
    plan: AttachPlan | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a model; see `lora_adapters.load`.

    Args:
        name, quantization, dtype, device, revision, trust_remote_code: as there.
        task: one of `TASKS`; None takes the class that the checkpoint names.
        ignore_mismatched_sizes: start weights anew that the checkpoint holds in another shape, such as another task's head.
        plan: store the base as this plan does, made on the model's skeleton: modules that it trains whole stay dense.
            `quantization` must be None then.
        **options: fields of the model's config, such as num_labels.

    Raises:
        RequestError: `quantization` and `plan` are both given.
    """
    if plan is not None:
        if quantization is not None:
            raise RequestError("A plan says how the base is stored: leave quantization out.")
        quantization = plan.request.quantization
    target = pick_device(device)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    auto, config, dtype = _what_to_load(name, options, source, task, dtype, target)
    skeleton = on_meta(auto, config, dtype, trust_remote_code)
    if plan is not None:
        formats = dict(plan.quantize)
    else:
        formats = quantized_layers(skeleton, quantization) if quantization is not None else {}
    if formats:
        require(("bitsandbytes",), "bnb", f"quantization={quantization!r}")
    check_load(skeleton, formats, name=name, revision=revision, dtype=dtype, device=str(target))
    bnb = _bnb_config(quantization, skeleton, formats, dtype)
    if bnb is not None:
        source["quantization_config"] = bnb
    source |= {"config": config, "dtype": dtype, "device_map": {"": target}, "output_loading_info": True}
    model, info = auto.from_pretrained(name, ignore_mismatched_sizes=ignore_mismatched_sizes, **source)
    _new_weights[model] = (*sorted(info["missing_keys"]), *sorted(key for key, *_ in info["mismatched_keys"]))
    guard_cpu_repacking(model)
    if formats and bnb is None:
        request = AttachRequest.make(quantization=quantization, targets="all-linear")
        quantize(model, plan or make_plan(model, request))
    return model


def skeleton(
    name: str,
    *,
    dtype: torch.dtype | str,
    revision: str | None,
    trust_remote_code: bool,
    task: str | None = None,
    ignore_mismatched_sizes: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Return the model that `load` would load, on the meta device: its config is read, its weights are not."""
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    auto, config, dtype = _what_to_load(name, options, source, task, dtype, torch.device("meta"))
    return on_meta(auto, config, dtype, trust_remote_code)


def _what_to_load(
    name: str,
    options: dict[str, Any],
    source: dict[str, Any],
    task: str | None,
    dtype: torch.dtype | str,
    device: torch.device,
) -> tuple[Any, PretrainedConfig, torch.dtype]:
    """Return the Auto class, the config and the dtype of dense weights."""
    config = read_config(name, options, source)
    return auto_class(config, task), config, _dtype(dtype, config, device)


def on_meta(auto: Any, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Return a model of this config on the meta device.

    Raises:
        UnsupportedError: transformers has no such class for this type of config.
    """
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UnsupportedError(
            f"transformers has no {auto.__name__} of type {config.model_type!r}. Give another model, or another task."
        ) from error


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Within this context transformers and the Hub's client show their progress bars, or none. The whole process is meant.

    HF_HUB_DISABLE_PROGRESS_BARS, where it is set, has the last word on the Hub's.
    """
    before, of_the_hub = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        # Both libraries warn where that variable is set, which is nothing to tell a user who set it.
        warnings.filterwarnings("ignore", message=".*HF_HUB_DISABLE_PROGRESS_BARS.*")
        logging.enable_progress_bar() if show else logging.disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*HF_HUB_DISABLE_PROGRESS_BARS.*")
            # transformers' switch moves the Hub's too, so the Hub's own comes last.
            logging.enable_progress_bar() if before else logging.disable_progress_bar()
            enable_progress_bars() if of_the_hub else disable_progress_bars()


def can_load(name: str, revision: str | None = None) -> bool:
    """Return True if `name` has a configuration that transformers knows, or that brings its own code (not run here)."""
    try:
        raw, _ = PretrainedConfig.get_config_dict(name, revision=revision)
        if "AutoConfig" in raw.get("auto_map", {}):
            return True
        AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError):
        return False
    return True


def new_weights(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of a loaded model that its checkpoint did not hold: they have random values."""
    return _new_weights.get(model, ())


def read_config(name: str, options: dict[str, Any], source: dict[str, Any]) -> PretrainedConfig:
    """Return a checkpoint's config with some fields set; fields it does not know are an error."""
    try:
        config = AutoConfig.from_pretrained(name, **source)
    except (OSError, ValueError) as error:
        hint = " If you trust its author, set trust_remote_code." if "trust_remote_code" in str(error) else ""
        raise LoraAdaptersError(f"{name!r} can't be loaded: {first_line(error)}{hint}") from error
    known = {*config.to_dict(), "num_labels", "id2label", "label2id", "attn_implementation"}
    for key in options:
        if key not in known and not hasattr(config, key):
            raise RequestError(f"{type(config).__name__} has no field {key!r}.{did_you_mean(key, sorted(known))}")
    return AutoConfig.from_pretrained(name, **source, **options) if options else config


def auto_class(config: PretrainedConfig, task: str | None) -> Any:
    """Return the Auto class for a task; without one, the Auto class of the model that the config names."""
    if task is not None:
        if task not in TASKS:
            raise RequestError(f"Unknown task {task!r}.{did_you_mean(task, TASKS)} Tasks: {', '.join(TASKS)}.")
        return getattr(transformers, TASKS[task])
    own_code = getattr(config, "auto_map", None) or {}
    for architecture in config.architectures or ():
        for auto in dict.fromkeys(TASKS.values()):
            if str(own_code.get(auto)).rpartition(".")[2] == architecture:
                return getattr(transformers, auto)
            mapping = getattr(transformers, auto)._model_mapping
            if type(config) in mapping and _names(mapping[type(config)], architecture):
                return getattr(transformers, auto)
    return transformers.AutoModel


def _names(classes: Any, architecture: str) -> bool:
    return any(cls.__name__ == architecture for cls in (classes if isinstance(classes, (tuple, list)) else (classes,)))


def _dtype(dtype: torch.dtype | str, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise RequestError(f"{dtype!r} is no floating dtype. Give 'auto', 'float32', 'bfloat16' or 'float16'.")
        return named
    wanted = config.dtype or torch.float32
    if (
        wanted == torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return torch.float16
    return wanted


def _bnb_config(
    quantization: Any, skeleton: nn.Module, formats: Mapping[str, str], dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """Return the config with which transformers quantizes exactly the layers in `formats`, None if it can't."""
    if not formats or len(set(formats.values())) > 1 or next(iter(formats.values())) not in _WHILE_READING:
        return None
    dense = [n for n, m in skeleton.named_modules() if _quantizable(m) and n not in formats]
    # Anchored and escaped: transformers also tries each entry as the end of a name.
    skip = [f"^{re.escape(name)}" for name in dense]
    if isinstance(quantization, BitsAndBytesConfig):
        if quantization.llm_int8_skip_modules is None:
            quantization.llm_int8_skip_modules = skip
        return quantization
    if "int8" in formats.values():
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=next(iter(formats.values())),
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def _quantizable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
