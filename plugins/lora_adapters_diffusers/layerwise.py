"""Quantizes each layer when its weight is read, inside diffusers' and transformers' own loading.

Both libraries build a model on the meta device, read one tensor after the other from mapped files, and hand each to a
quantizer of theirs, if there is one. The two quantizers here hand it on to ours, so that folders, shards, variants, single
files, dtypes and devices are dealt with as in any other load, and a dense model is never in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers import auto as diffusers_auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin as DiffusersConfig
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfig

from lora_adapters.direct_reads import keep_called
from lora_adapters.errors import CheckpointError, LoraAdaptersError
from lora_adapters.quantized import quantizers_of
from lora_adapters.sharing import places_of, put
from lora_adapters.weights import mark_quantized, quantize_module


class _Method(str, Enum):
    """The name by which both libraries find the quantizers of this file."""

    LAYERWISE = "lora_adapters"


class _Config:
    """Carries the request through a library's loading: `quantization` is as for `lora_adapters.attach`."""

    def __init__(self, quantization: Any) -> None:
        self.quant_method: Any = _Method.LAYERWISE
        self.quantization = quantization

    def to_dict(self) -> dict[str, Any]:
        """Return what can be written as JSON."""
        return {"quant_method": _Method.LAYERWISE.value}

    to_diff_dict = to_dict


class Layers:
    """The layers of a model on the meta device that wait for their weight, to be quantized then."""

    def __init__(self, model: nn.Module, quantization: Any) -> None:
        self.model = model
        self.quantizers = quantizers_of(model, quantization)
        self._places = places_of(model)
        self._made: dict[int, nn.Module] = {}

    def wants(self, key: str) -> bool:
        """Return True if this parameter is the weight of a layer to quantize."""
        name, _, leaf = key.rpartition(".")
        return leaf == "weight" and name in self.quantizers

    def take(self, key: str, weight: torch.Tensor) -> None:
        """Put a quantized layer in the place of an empty one.

        Args:
            key: name of the weight.
            weight: its values, in the dtype to compute in, on the device that the layer shall be on.
        """
        name = key.rpartition(".")[0]
        empty = self.model.get_submodule(name)
        if id(empty) in self._made:  # another name of a layer that is there already
            return
        empty._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)
        made = quantize_module(name, empty, self.quantizers[name], weight.dtype)
        put(self._places[id(empty)], made)
        self._made[id(made)] = made


# ---- in diffusers ----------------------------------------------------------------------------------------------------


class DiffusersLayerwiseConfig(_Config, DiffusersConfig):
    """What diffusers' `quantization_config=` takes."""


class DiffusersLayerwise(DiffusersQuantizer):
    """Gives the weights that diffusers reads to `Layers`."""

    #: Loading without a quantizer keeps those modules in fp32 as well.
    use_keep_in_fp32_modules = True
    supports_parallel_loading = False
    is_serializable = is_trainable = True

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember which tensors the files hold, before any is read."""
        self.keys = loaded_keys
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, state_dict: Any = None, **kwargs: Any) -> None:
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        found = [k for k in (self.keys if state_dict is None else state_dict) if not _any(ignored, k)]
        check_keys(type(model).__name__, model.state_dict(), found)
        self.layers = Layers(model, self.quantization_config.quantization)

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: Any, **kwargs: Any
    ) -> bool:
        """Return True for a weight to quantize."""
        return self.layers.wants(param_name)

    def check_quantized_param_shape(self, name: str, wanted: torch.Tensor, found: torch.Tensor) -> bool:
        """Raise: what is read is dense, so that another shape is another model's."""
        raise CheckpointError(
            f"{name} has the shape {tuple(found.shape)} in the file and {tuple(wanted.shape)} in the model: config and "
            "weights are of different models."
        )

    def create_quantized_param(
        self, model: Any, param: torch.Tensor, name: str, device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Quantize one layer; `param` has the dtype that was asked for."""
        self.layers.take(name, param.to(device))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model


# ---- in transformers -------------------------------------------------------------------------------------------------


class TransformersLayerwiseConfig(_Config, TransformersConfig):
    """What transformers' `quantization_config=` takes."""


class TransformersLayerwise(HfQuantizer):
    """Gives the weights that transformers reads to `Layers`."""

    is_trainable = True

    def is_serializable(self) -> bool:
        """Return True: what it makes are ordinary 4-bit layers."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.layers = Layers(model, self.quantization_config.quantization)
        self.wanted = set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", None) or ())
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        self.wanted = {key for key in self.wanted if not _any(ignored, key)}
        self.found: set[str] = set()
        self.error: LoraAdaptersError | None = None

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return True for a weight to quantize. transformers asks about every tensor that has a place in the model."""
        self.found.add(param_name)
        return self.layers.wants(param_name)

    def get_quantize_ops(self) -> Any:
        """Return what transformers runs on each of those weights."""
        return _Take(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.error is not None:
            raise self.error
        check_keys(type(model).__name__, self.wanted, self.found & self.wanted)
        return model


class _Take(ConversionOps):
    """Quantizes one layer."""

    def __init__(self, quantizer: TransformersLayerwise) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Take the weight out of transformers' hands: nothing is left for it to put into the model."""
        for key, value in input_dict.items():
            try:
                self.quantizer.layers.take(key, value[0] if isinstance(value, list) else value)
            except LoraAdaptersError as error:  # transformers would report it as one of its own
                self.quantizer.error = self.quantizer.error or error
            if missing_keys is not None:
                missing_keys.discard(key)
            # What has this mark is not initialized as if it were missing.
            layer: Any = self.quantizer.layers.model.get_submodule(key.rpartition(".")[0])
            layer._is_hf_initialized = layer.weight._is_hf_initialized = True
        return {}


# ---- both ------------------------------------------------------------------------------------------------------------


def _any(patterns: Iterable[str], key: str) -> bool:
    return any(re.search(pattern, key) for pattern in patterns)


def check_keys(model: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Raise CheckpointError if the names of a model's tensors and of those in its files differ."""
    wanted, found = set(wanted), set(found)
    if missing := sorted(wanted - found):
        raise CheckpointError(
            f"The files lack {len(missing)} of the {len(wanted)} tensors of {model}, first {missing[0]!r}: they are "
            "incomplete, or of another model than the config."
        )
    if strange := sorted(found - wanted):
        raise CheckpointError(
            f"The files hold {len(strange)} tensors that {model} has no place for, first {strange[0]!r}: config and "
            "weights are of different models."
        )


def finish(model: Any) -> bool:
    """Make a loaded model look as if it had been quantized in memory; return False if it was not quantized here.

    Dense parameters are copied out of the mapped files, which can be let go then.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, (DiffusersLayerwise, TransformersLayerwise)):
        return False
    if isinstance(quantizer, TransformersLayerwise):
        quantizer.remove_quantization_config(model)
        for module in model.modules():
            for marked in (module, *module._parameters.values()):
                getattr(marked, "__dict__", {}).pop("_is_hf_initialized", None)
            if (config := getattr(module, "config", None)) is not None:
                vars(config).pop("_is_quantized", None)
    else:
        gone = ("quantization_config", "_pre_quantization_dtype")
        model._internal_dict = type(model._internal_dict)({k: v for k, v in model.config.items() if k not in gone})
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone()
    keep_called(model)
    if quantizer.layers.quantizers:
        mark_quantized(model, next(iter(quantizer.layers.quantizers.values())))
    return True


def register() -> None:
    """Make both libraries know the quantizers, once a process."""
    method = _Method.LAYERWISE.value
    if method not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(method)(TransformersLayerwiseConfig)
        register_quantizer(method)(TransformersLayerwise)
    # diffusers has no function for it.
    diffusers_auto.AUTO_QUANTIZER_MAPPING.setdefault(method, DiffusersLayerwise)
    diffusers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(method, DiffusersLayerwiseConfig)


register()
