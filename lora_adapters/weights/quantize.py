"""From a request to quantized modules: which quantizer, which store, and the replacement in place."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..direct_reads import keep_called
from ..error_text import did_you_mean
from ..errors import MissingDependencyError, PluginError, PluginWarning, RequestError
from ..hooks.manager import load_object, plugins, require
from ..hooks.specs import QuantizerSpec
from ..sharing import places_of, put, tied_names
from .bnb import bnb_store
from .dense import DenseStore, dense_store
from .store import Quantizer, WeightStore

_QUANTIZERS = "lora_adapters.weights.bnb_quantizers"
_ALL_KINDS = ("linear", "conv1d", "conv2d")

#: The quantizers that need no plugin, by the word a user writes.
BUILTIN_QUANTIZERS: Mapping[str, QuantizerSpec] = {
    "nf4": QuantizerSpec("nf4", 4, _ALL_KINDS, f"{_QUANTIZERS}:Nf4", ("bitsandbytes",), "bnb"),
    "fp4": QuantizerSpec("fp4", 4, _ALL_KINDS, f"{_QUANTIZERS}:Fp4", ("bitsandbytes",), "bnb"),
    "int8": QuantizerSpec("int8", 8, ("linear",), f"{_QUANTIZERS}:Int8", ("bitsandbytes",), "bnb"),
}


def quantizer_for(request: Any, quantizers: Mapping[str, QuantizerSpec] | None = None) -> Quantizer:
    """Return the quantizer that a request means.

    Args:
        request: a name, transformers' BitsAndBytesConfig (anything with its attributes), or a Quantizer.
        quantizers: what plugins offer, by name; a built-in name always means the built-in quantizer.

    Raises:
        RequestError: no such name, or a config that asks for what can't be done in memory.
        MissingDependencyError: the quantizer's package is not installed.
        PluginError: a plugin's target is no quantizer.
    """
    if isinstance(request, str):
        return _by_name(request, {**(quantizers or {}), **BUILTIN_QUANTIZERS})
    if hasattr(request, "load_in_4bit") or hasattr(request, "load_in_8bit"):
        require(("bitsandbytes",), "bnb", "A BitsAndBytesConfig")
        return _by_config(request)
    if isinstance(request, Quantizer) and not isinstance(request, type):
        return request
    raise RequestError(
        f"quantization={request!r} is neither a name ({', '.join({**(quantizers or {}), **BUILTIN_QUANTIZERS})}), "
        "nor a BitsAndBytesConfig, nor a Quantizer object."
    )


def _by_name(name: str, known: Mapping[str, QuantizerSpec]) -> Quantizer:
    spec = known.get(name)
    if spec is None:
        hint = did_you_mean(name.lower(), known, cutoff=0.5)
        raise RequestError(f"No quantization is called {name!r}.{hint} There are: {', '.join(sorted(known))}.")
    require(spec.requires, spec.extra, f"quantization={name!r}")
    try:
        quantizer = load_object(spec.target)()
    except MissingDependencyError:
        raise
    except Exception as error:
        raise PluginError(f"Quantizer {name!r} ({spec.target}) can't be made: {error}") from error
    if not isinstance(quantizer, Quantizer):
        raise PluginError(f"Quantizer {name!r}: {spec.target} lacks part of lora_adapters.weights.Quantizer.")
    return quantizer


def _by_config(config: Any) -> Quantizer:
    """Return the quantizer that a BitsAndBytesConfig describes, its compute dtype and skip list included."""
    from .bnb_quantizers import Bnb4bit, Int8

    if getattr(config, "llm_int8_enable_fp32_cpu_offload", False):
        raise RequestError("llm_int8_enable_fp32_cpu_offload needs a device map: use load(..., quantization=config).")
    skip = tuple(getattr(config, "llm_int8_skip_modules", None) or ())
    if getattr(config, "load_in_4bit", False):
        return Bnb4bit(
            quant_type=config.bnb_4bit_quant_type,
            nested=bool(config.bnb_4bit_use_double_quant),
            quant_storage=getattr(config, "bnb_4bit_quant_storage", None) or torch.uint8,
            compute_dtype=config.bnb_4bit_compute_dtype,
            skip=skip,
        )
    if not getattr(config, "load_in_8bit", False):
        raise RequestError("The BitsAndBytesConfig asks for neither load_in_4bit nor load_in_8bit.")
    if getattr(config, "llm_int8_has_fp16_weight", False):
        raise RequestError("llm_int8_has_fp16_weight=True keeps 16-bit weights; leave it False, or don't quantize.")
    return Int8(threshold=config.llm_int8_threshold, skip=skip)


def store_for(module: nn.Module, quantizers: Iterable[Quantizer] = ()) -> WeightStore | None:
    """Return the store of any base module, or None if nobody knows how it holds its weight.

    Args:
        module: the base module, not an adapter layer around it.
        quantizers: quantizers to ask first, besides those of the installed plugins.
    """
    for quantizer in quantizers:
        if (store := quantizer.store(module)) is not None:
            return store
    return bnb_store(module) or _plugin_store(module) or dense_store(module)


def _plugin_store(module: nn.Module) -> WeightStore | None:
    """Return the store an installed plugin's quantizer has for a module; a plugin that fails is reported and passed."""
    # torch's own layers are dense, containers hold nothing: that is most of a model, and nobody is asked about it.
    if type(module).__module__.startswith("torch.nn.") or not (module._parameters or module._buffers):
        return None
    for name, spec in plugins().quantizers().items():
        try:
            if (store := _by_name(name, {name: spec}).store(module)) is not None:
                return store
        except MissingDependencyError:
            continue
        except Exception as error:
            message = f"Quantizer {name!r} was asked about a {type(module).__name__} and failed: {error}"
            if os.environ.get("LORA_ADAPTERS_STRICT", "") not in ("", "0"):
                raise PluginError(message) from error
            warnings.warn(message, PluginWarning, stacklevel=3)
    return None


def quantized_format(model: nn.Module, quantizers: Iterable[Quantizer] = ()) -> str | None:
    """Return how a model is quantized: "nf4", "int8+nf4", a foreign method's name ("gptq"), or None if it is dense."""
    quantizers = tuple(quantizers)
    stores = (store_for(module, quantizers) for module in model.modules())
    formats = {store.format for store in stores if store is not None and store.format != "dense"}
    if formats:
        return "+".join(sorted(formats))
    method = getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def quantize_modules(
    model: nn.Module,
    assignment: Mapping[str, Quantizer],
    compute_dtype: torch.dtype,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Replace the named modules by quantized ones, in place, one at a time: extra memory is that of one layer.

    Everything is checked before the first change. A module registered under several names is replaced under all.

    Args:
        model: the model.
        assignment: module name -> its quantizer.
        compute_dtype: floating dtype the new modules compute in.
        progress: called after each module with (modules done, modules in all, name).

    Raises:
        RequestError: a name is unknown or the root, a quantizer refuses a module, a weight is tied, or not finite.
    """
    _validate(model, assignment)
    places = places_of(model)
    done: dict[int, nn.Module] = {}
    for count, (name, quantizer) in enumerate(assignment.items(), start=1):
        old = model.get_submodule(name)
        # A second name of a module already replaced leads to the new module.
        if id(old) not in done:
            new = quantizer.quantize(old, compute_dtype)
            put(places[id(old)], new)
            done[id(new)] = new
            del new
        del old
        if progress is not None:
            progress(count, len(assignment), name)
    keep_called(model)


def quantize_module(name: str, module: nn.Module, quantizer: Quantizer, compute_dtype: torch.dtype) -> nn.Module:
    """Return the quantized twin of one dense module, for callers that put it in its place themselves.

    Args:
        name: what errors call it.
        module: the dense module; it is left as it is.
        quantizer, compute_dtype: as for `quantize_modules`.

    Raises:
        RequestError: the quantizer can't take it, or its weight is not finite or too large.
    """
    if reason := quantizer.supports(module):
        raise RequestError(f"Can't quantize {name!r} to {quantizer.name}: {reason}.")
    _check_values(name, module, getattr(quantizer, "largest", None))
    return quantizer.quantize(module, compute_dtype)


def _validate(model: nn.Module, assignment: Mapping[str, Quantizer]) -> None:
    """Raise RequestError for the first name that can't be replaced."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tied = tied_names(model)
    chosen: dict[int, Quantizer] = {}
    for name, quantizer in assignment.items():
        if name not in modules or not name:
            hint = did_you_mean(name, filter(None, modules))
            raise RequestError(f"Can't quantize {name!r}: the model has no such submodule.{hint}")
        module = modules[name]
        if reason := quantizer.supports(module) or tied.get(name, ""):
            raise RequestError(f"Can't quantize {name!r} to {quantizer.name}: {reason}.")
        if chosen.setdefault(id(module), quantizer) != quantizer:
            raise RequestError(f"{name!r} is the same module as another name that another quantizer was asked for.")
        _check_values(name, module, getattr(quantizer, "largest", None))


def _check_values(name: str, module: nn.Module, largest: float | None) -> None:
    """Raise RequestError if the weight has a value that is not finite or beyond what the quantizer can take."""
    weight = DenseStore(module).logical
    if weight.device.type == "meta" or not weight.numel():
        return
    for limit in weight.aminmax():
        if not torch.isfinite(limit):
            raise RequestError(f"Can't quantize {name!r}: its weight holds values that are not finite.")
        if largest is not None and abs(limit.item()) > largest:
            raise RequestError(f"Can't quantize {name!r}: its weight holds {limit.item():g}; the limit is {largest:g}.")
