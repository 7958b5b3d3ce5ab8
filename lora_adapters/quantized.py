"""Which base modules are quantized, and by which quantizer; which must be dense because other code reads them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .backends import backend_for, base_of, classify, unwrap
from .errors import LoraAdaptersWarning, RequestError, UnsupportedError
from .hooks.manager import plugins
from .request import AttachRequest
from .sharing import places_of, put, tied_names
from .targets import Backend, Classification, ModelInfo, candidates, expand
from .trained import inside, trained_names

if TYPE_CHECKING:
    from torch import nn

    from .weights import Quantizer

#: Roles that `quantization="nf4"` covers when nothing finer is asked: heads, embeddings and routers stay dense.
QUANTIZED_ROLES = ("q", "k", "v", "o", "qkv", "kv", "mlp", "time", "other")


def assign_quantizers(
    info: ModelInfo,
    classes: Classification,
    request: AttachRequest,
    trained: tuple[str, ...],
    backend: Backend,
    tied: Mapping[str, str],
) -> dict[str, Quantizer]:
    """Return module name -> Quantizer of every base module to quantize."""
    wanted = request.quantization
    if wanted is None:
        return {}
    from .weights import quantized_format

    existing = quantized_format(info.model)
    specs = plugins().quantizers()
    by_role = _roles_to_quantize(wanted, getattr(backend, "quantized_roles", QUANTIZED_ROLES), specs)
    if existing:
        if all(q.name == existing for q in by_role.values()):
            return {}
        raise RequestError(
            f"The model is already quantized to {existing}, and quantization={wanted!r} asks for another format. "
            "Leave quantization out to keep it, or load the model again."
        )
    dense = getattr(backend, "dense_modules", lambda model: ())(info.model)
    quantizers: dict[str, Quantizer] = {}
    for name, module in info.modules.items():
        role = classes.roles.get(name, "other")
        quantizer = by_role.get(role)
        if quantizer is None or inside(name, trained) or name in tied or quantizer.supports(base_of(module)):
            continue
        if any(_stays_dense(name, pattern) for pattern in (*dense, *getattr(quantizer, "skip", ()))):
            continue
        if base_of(module) is not module:
            raise RequestError(
                f"{name!r} already carries an adapter, so its base can't be quantized any more: quantize first."
            )
        quantizers[name] = quantizer
    if not quantizers:
        raise UnsupportedError(f"quantization={wanted!r} can store none of this model's layers.")
    return quantizers


def leave_read_dense(quantizers: dict[str, Quantizer], classes: Classification, adapted: set[str]) -> list[str]:
    """Take the modules whose weight is read without a call, and that no adapter unpacks, out of `quantizers`.

    Returns:
        Notes that say so.
    """
    left = [name for name in quantizers if name in classes.reads and name not in adapted]
    for name in left:
        del quantizers[name]
    if not left:
        return []
    return [
        f"{len(left)} modules stay dense (first {left[0]!r}): {classes.reads[left[0]]} reads the weight without calling "
        "the module, and would read packed bytes, since no adapter of this plan unpacks it."
    ]


def unpack_read(model: nn.Module, names: Iterable[str]) -> None:
    """Make quantized modules dense, with the dequantized weights, and say so.

    Args:
        model: the model.
        names: modules whose weight other code reads. Those that carry an adapter stay: it unpacks them.
    """
    from .weights import store_for

    places = places_of(model)
    packed = [(module, store_for(module)) for module in map(model.get_submodule, names) if base_of(module) is module]
    packed = [(module, store) for module, store in packed if store is not None and store.format != "dense"]
    for module, store in packed:
        put(places[id(module)], store.dense_module(store.read()))
    if packed:
        message = (
            f"{len(packed)} quantized modules became dense: other code reads their weight without calling them, and "
            "without an adapter it would read packed bytes. They take more memory now."
        )
        warnings.warn(message, LoraAdaptersWarning, stacklevel=3)


def quantized_layers(model: nn.Module, quantization: Any) -> dict[str, str]:
    """Return module name -> format of what `attach(model, quantization=...)` would quantize, on any device."""
    return {name: quantizer.name for name, quantizer in quantizers_of(model, quantization).items()}


def quantizers_of(model: nn.Module, quantization: Any) -> dict[str, Quantizer]:
    """Return module name -> quantizer of what `attach(model, quantization=...)` would quantize, on any device."""
    base = unwrap(model)
    backend, _ = backend_for(base)
    info = ModelInfo(backend.name, backend.family(base), candidates(base), base)
    request = AttachRequest.make(quantization=quantization)
    trained = trained_names(base, backend.heads_to_train(base))
    classes = classify(backend, info, request)
    quantizers = assign_quantizers(info, classes, request, trained, backend, tied_names(base))
    leave_read_dense(quantizers, classes, set())
    return quantizers


def _roles_to_quantize(wanted: Any, default_roles: tuple[str, ...], specs: Mapping[str, Any]) -> dict[str, Quantizer]:
    from .weights import quantizer_for

    if not isinstance(wanted, Mapping):
        return dict.fromkeys(default_roles, _registered(quantizer_for(wanted, specs), specs))
    by_role: dict[str, Quantizer] = {}
    for expression, fmt in wanted.items():
        for word in str(expression).split("+"):
            roles = expand(word.strip())
            if roles is None:
                raise RequestError(f"quantization: {word!r} is no role; give roles such as 'attention' or 'mlp'.")
            if fmt is not None:
                by_role |= dict.fromkeys(roles, _registered(quantizer_for(fmt, specs), specs))
    return by_role


def _registered(quantizer: Quantizer, specs: Mapping[str, Any]) -> Quantizer:
    """Return a quantizer whose layers `store_for` will know later, when they are merged or restored."""
    cls = type(quantizer)
    if cls.__module__.startswith("lora_adapters.") or f"{cls.__module__}:{cls.__qualname__}" in {
        spec.target for spec in specs.values()
    }:
        return quantizer
    raise RequestError(
        f"Quantizer {cls.__name__} is of no active plugin, so nothing could read the layers it makes, to merge them or "
        "to restore an adapter on them. Offer it through the hook lora_adapters_quantizers (docs/plugins.md)."
    )


def _stays_dense(name: str, pattern: str) -> bool:
    """Match a name as transformers matches llm_int8_skip_modules: a prefix, a regular expression or a suffix."""
    return name.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) is not None
