"""diffusers' own file, `pytorch_lora_weights.safetensors`, those of its older versions, and ai-toolkit's.

Keys are `<component>.<module>.lora_A.weight`; the header's `lora_adapter_metadata` is JSON with the fields of each
component's LoraConfig, as `unet.lora_alpha`. Without it the scaling is 1, which is how stock diffusers reads such a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapter_config import AdapterConfigData, parse_config, parse_json
from ..errors import CheckpointError, UnsupportedError
from .base import Encoded, write_encoded
from .factors import Factors, LoraFactors
from .families import FAMILIES, family_in_metadata, family_of, header_entries
from .keys import Layer, factors_of, layers_of, refused_keys, split_key, tensors_for
from .peft_fields import as_lora, with_config
from .portable import COMPONENT, PortableAdapter
from .source import Source
from .text_encoder_names import with_text_model
from .unet_names import DIFFUSERS_NAMES

METADATA_KEY = "lora_adapter_metadata"
_TRANSFORMER = re.compile(r"(single_)?transformer_blocks\.\d+\.")
#: The first attention processors' names of a text encoder's projections.
_OLD_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def place_of(name: str) -> tuple[str, str, str] | None:
    """Return (component, module, the name's beginning that is neither) of a layer's name in a file; None if it has none."""
    first, _, rest = name.partition(".")
    if COMPONENT.fullmatch(first) and rest:
        return first, _module(first, rest), f"{first}."
    module = _module("unet", name)
    if module in DIFFUSERS_NAMES:
        return "unet", module, ""
    return ("transformer", name, "") if _TRANSFORMER.match(name) else None


def _module(component: str, name: str) -> str:
    name = name.replace(".processor.", ".")
    stem, _, last = name.rpartition(".")
    if component.startswith("text_encoder"):
        name = f"{stem}.{_OLD_PROJECTIONS.get(last, last)}" if stem.endswith("self_attn") else name
        return with_text_model(component, name)
    # The first processors' to_out_lora: later it is the first of two modules.
    return f"{name}.0" if last == "to_out" and re.search(r"\.attn\d?$", stem) and component == "unet" else name


class DiffusersFile:
    """The format "diffusers"."""

    def detect(self, source: Source) -> bool:
        """True if every LoRA key has a component, or the name of a UNet's or a transformer's layer."""
        layers = [split for key in source.shapes if (split := split_key(key))]
        return bool(layers) and all(place_of(name) is not None for name, _ in layers)

    def read(self, source: Source) -> PortableAdapter:
        """Read it, with the scaling that stock diffusers gives it, or that its `.alpha` tensors say."""
        layers = layers_of(source.load(), source.origin)
        places = {name: place_of(name) for name in layers}
        if lost := [name for name, place in places.items() if place is None]:
            raise refused_keys(lost, source.origin)
        family = source.family or family_in_metadata(source.metadata)
        components: dict[str, dict[str, Factors]] = {}
        for name, place in places.items():
            assert place is not None
            factors = factors_of(layers[name], source.origin)
            if components.setdefault(place[0], {}).setdefault(place[1], factors) is not factors:
                raise CheckpointError(f"{source.origin} is damaged: it holds {place[1]!r} of the {place[0]} twice.")
        configs = _configs(source, {place[0]: place[2] for place in places.values() if place})
        for component, config in configs.items():
            modules = components[component]
            components[component] = {**_configured(component, modules, config, layers, places, source)}
        kept = {key: value for key, value in source.metadata.items() if key not in (METADATA_KEY, "format")}
        adapter = PortableAdapter(components, family, kept)
        return replace(adapter, family=family_of(adapter))

    def encode(self, adapter: PortableAdapter, family: str) -> Encoded:
        """Return the file's content; see `Format.write`."""
        tensors: dict[str, Tensor] = {}
        config: dict[str, object] = {}
        notes: list[str] = []
        for component, modules in adapter.components.items():
            lora = as_lora(component, modules)
            notes += [*lora.notes, *_not_in_stock(component, lora.modules)]
            config |= {f"{component}.{key}": value for key, value in lora.fields.items()}
            for name, factors in lora.modules.items():
                ends = tensors_for(factors, "peft")
                tensors |= {
                    f"{component}.{with_text_model(component, name)}{end}": tensor for end, tensor in ends.items()
                }
        metadata = {"format": "pt", METADATA_KEY: json.dumps(config, sort_keys=True)}
        if family in FAMILIES:
            metadata |= header_entries(FAMILIES[family], adapter, "networks.lora", {})
        return Encoded(tensors, metadata, tuple(notes))

    def write(self, adapter: PortableAdapter, path: Path, family: str) -> tuple[str, ...]:
        """Write it; the header also tells A1111 and ComfyUI what the adapter is for."""
        return write_encoded(self.encode(adapter, family), path)


def _not_in_stock(component: str, modules: Mapping[str, Factors]) -> list[str]:
    """Return what stock diffusers would pass over, or refuse."""
    found = []
    if t5 := [name for name in modules if component.startswith("text_encoder") and name.startswith("encoder.block.")]:
        found.append(f"{component}: stock diffusers loads no adapters of T5, and passes over {len(t5)} layers")
    attention = any(name.endswith(("q_proj", "k_proj", "v_proj", "out_proj")) for name in modules)
    if component.startswith("text_encoder") and not t5 and not attention:
        found.append(
            f"{component}: stock diffusers (0.42) refuses adapters of a text encoder without any on its attention"
        )
    return found


def _configs(source: Source, prefixes: Mapping[str, str]) -> dict[str, AdapterConfigData]:
    """Return component -> config, checked, of those that the header has one for."""
    if METADATA_KEY not in source.metadata:
        return {}
    where = f"{METADATA_KEY} of {source.origin}"
    raw = parse_json(source.metadata[METADATA_KEY].encode(), where)
    configs = {}
    for component, prefix in prefixes.items():
        fields = {key.removeprefix(prefix): value for key, value in raw.items() if key.startswith(prefix)}
        if not fields:
            continue
        if fields.get("peft_type", "LORA") != "LORA":
            raise UnsupportedError(
                f"{where} is of a {str(fields['peft_type'])[:40]!r} adapter; only LORA is read from it."
            )
        configs[component] = parse_config(json.dumps(fields | {"peft_type": "LORA"}).encode())
    return configs


def _configured(
    component: str,
    modules: Mapping[str, Factors],
    config: AdapterConfigData,
    layers: Mapping[str, Layer],
    places: Mapping[str, tuple[str, str, str] | None],
    source: Source,
) -> dict[str, LoraFactors]:
    """Give a component's layers the alphas of its config, looked up by the names that the file has."""
    named: dict[str, LoraFactors] = {}
    back: dict[str, str] = {}
    for name, place in places.items():
        if place is None or place[0] != component:
            continue
        if "alpha" in layers[name].parts:
            raise CheckpointError(
                f"{source.origin}: {name[:200]!r} has an alpha in {METADATA_KEY} and one of its own. Remove one."
            )
        factors, there = modules[place[1]], name.removeprefix(place[2])
        if not isinstance(factors, LoraFactors):
            raise CheckpointError(
                f"{source.origin}: {name[:200]!r} is {factors.kind}, but {METADATA_KEY} describes LoRA."
            )
        named[there], back[there] = factors, place[1]
    return {back[name]: factors for name, factors in with_config(named, config, source.origin).items()}


class AiToolkitFile(DiffusersFile):
    """The format "ai-toolkit": diffusers' keys of a transformer, no alphas and no config, so that the scaling is 1."""

    def detect(self, source: Source) -> bool:
        """True if the header says that ai-toolkit wrote it."""
        return "ai-toolkit" in source.metadata.get("software", "") and super().detect(source)

    def encode(self, adapter: PortableAdapter, family: str) -> Encoded:
        """Return the file's content, with each layer's scaling multiplied into its B; see `Format.write`."""
        if others := sorted(set(adapter.components) - {"transformer"}):
            raise UnsupportedError(
                f"ai-toolkit's format holds a transformer's adapter, not that of {', '.join(others)}. Write the diffusers "
                "format, or kohya's."
            )
        lora = as_lora("transformer", adapter.components["transformer"])
        if lora.fields["use_dora"] or lora.fields["lora_bias"]:
            raise UnsupportedError("ai-toolkit's format has neither DoRA nor biases. Write the diffusers format.")
        tensors: dict[str, Tensor] = {}
        rounded: list[Tensor] = []
        for name, factors in lora.modules.items():
            exact = factors.b.double() * factors.scaling
            b = exact.to(factors.b.dtype)
            if not torch.equal(b.double(), exact):
                rounded.append(b)
            tensors |= {
                f"transformer.{name}{end}": one for end, one in tensors_for(replace(factors, b=b), "peft").items()
            }
        notes = list(lora.notes)
        if any(factors.scaling != 1 for factors in lora.modules.values()):
            notes.append("alphas are gone: the format has none, so that each layer's scaling is in its B now")
        if rounded:
            error = max(torch.finfo(b.dtype).eps for b in rounded) / 2
            notes.append(
                f"B of {len(rounded)} layers was rounded when it was scaled, by at most {error:.1g} of each value"
            )
        return Encoded(tensors, {"format": "pt", "software": json.dumps({"name": "ai-toolkit"})}, tuple(notes))
