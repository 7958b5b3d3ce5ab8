"""kohya's file, which ComfyUI, A1111, Forge and InvokeAI read, and LyCORIS', which has the same names and more kinds.

Keys are `<prefix>_<layer>.lora_down.weight`, `.lora_up.weight` and `.alpha` (a scalar; scaling = alpha / rank),
and in LyCORIS `.hada_*`, `.lokr_*`, `.lora_mid.weight`, `.dora_scale`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ..adapter_config import MAX_ALPHA, MAX_RANK, parse_json
from ..errors import CheckpointError, RequestError, UnsupportedError
from .base import Encoded, write_encoded
from .factors import Factors, LoraFactors
from .families import FAMILIES, Family, family_named, family_of, header_entries
from .fused import Part, join, split, swap_halves
from .keys import Layer, factors_of, layers_of, refused_keys, split_key, tensors_for
from .kohya_names import Place, Written, family_by_names, find, is_kohya, kohya_name, written
from .low_rank import low_rank
from .peft_fields import describe_folded
from .portable import PortableAdapter
from .source import Source
from .unet_names import kernel_of

#: What joined layers were, so that they are split as they were joined.
FUSED_ENTRY = "lora_adapters.fused"
_LYCORIS = ("hada_", "lokr_", "mid", "dora_scale")
_DTYPES = ("float64", "float32", "float16", "bfloat16")


class KohyaFile:
    """The format "kohya": plain LoRA in kohya's names."""

    lycoris: ClassVar[bool] = False

    def detect(self, source: Source) -> bool:
        """True if all layers have kohya's prefixes, and none has what only LyCORIS has."""
        parts = [split for key in source.shapes if (split := split_key(key))]
        own = bool(parts) and is_kohya(name for name, _ in parts)
        return own and self.lycoris == any(part.startswith(_LYCORIS) for _, part in parts)

    def read(self, source: Source) -> PortableAdapter:
        """Read it, with the family that its header says, or its layers' names and sizes."""
        layers = {kohya_name(name): layer for name, layer in layers_of(source.load(), source.origin).items()}
        family = source.family or family_by_names(layers, source.metadata)
        places = {name: find(name, family) for name in layers}
        if lost := [name for name, place in places.items() if place is None]:
            raise refused_keys(lost, source.origin)
        adapter = _assembled(layers, places, family, source)
        found = family_of(adapter)
        if found != family:  # A flattened convolution's kernel follows from the family.
            adapter = _assembled(layers, places, found, source)
        return adapter

    def encode(self, adapter: PortableAdapter, family: str) -> Encoded:
        """Return the file's content; see `Format.write`."""
        into = _family(adapter, family)
        components, notes = self._components(adapter)
        slots, swapped = _slots(components, into)
        tensors: dict[str, Tensor] = {}
        records: dict[str, list[Part]] = {}
        rounded = 0
        for name, parts in slots.items():
            if len(parts) == 1:
                factors = parts[0]
            else:
                factors, records[name], error = join(parts, _sizes(parts))
                rounded += error > 0
            assert factors is not None
            factors = swap_halves(factors) if name in swapped else factors
            _check_holds(factors, name)
            tensors |= {f"{name}{end}": tensor for end, tensor in tensors_for(factors, "kohya").items()}
        if rounded:
            notes.append(
                f"{rounded} fused layers are of layers with several scalings: B was scaled, by up to 6e-8 of each value off"
            )
        metadata = {"format": "pt", **header_entries(into, adapter, *self._module(adapter))}
        if records:
            metadata[FUSED_ENTRY] = json.dumps(
                {name: [list(asdict(part).values()) for part in r] for name, r in records.items()}
            )
        return Encoded(tensors, metadata, tuple(notes))

    def write(self, adapter: PortableAdapter, path: Path, family: str) -> tuple[str, ...]:
        """Write it, with the header by which UIs know what it is for."""
        return write_encoded(self.encode(adapter, family), path)

    def _components(self, adapter: PortableAdapter) -> tuple[Mapping[str, Mapping[str, Factors]], list[str]]:
        """Return the factors to write, and what was changed."""
        notes: list[str] = []
        found: dict[str, dict[str, Factors]] = {}
        for component, modules in adapter.components.items():
            found[component] = {name: low_rank(factors) for name, factors in modules.items()}
            notes += describe_folded(component, modules, found[component])  # type: ignore[arg-type]
        return found, notes

    def _module(self, adapter: PortableAdapter) -> tuple[str, dict[str, str]]:
        return "networks.lora", {}


class LycorisFile(KohyaFile):
    """The format "lycoris": LoRA, LoHa, LoKr, Tucker cores and DoRA, as they are."""

    lycoris = True

    def _components(self, adapter: PortableAdapter) -> tuple[Mapping[str, Mapping[str, Factors]], list[str]]:
        return adapter.components, []

    def _module(self, adapter: PortableAdapter) -> tuple[str, dict[str, str]]:
        kinds = [factors.kind for _, _, factors in adapter]
        algorithm = {"LoRA": "lora", "LoHa": "loha", "LoKr": "lokr"}[max(dict.fromkeys(kinds), key=kinds.count)]
        return "lycoris.kohya", {"algo": algorithm} | ({"dora_wd": "True"} if "DoRA" in adapter.kinds else {})


def _assembled(
    layers: Mapping[str, Layer], places: Mapping[str, Place | None], family: str, source: Source
) -> PortableAdapter:
    records = _records(source)
    components: dict[str, dict[str, Factors]] = {}
    split_layers = 0
    for name, place in places.items():
        assert place is not None
        kernel = kernel_of(place.modules[0], family) if place.component == "unet" else ()
        factors = factors_of(layers[name], source.origin, kernel)
        modules = components.setdefault(place.component, {})
        split_layers += len(place.modules) > 1
        for module, part in _parted(factors, place, records.get(name)):
            if module in modules:
                raise CheckpointError(
                    f"{source.origin} is damaged: two of its layers are {module!r} of the {place.component}."
                )
            modules[module] = part
    kept = {key: value for key, value in source.metadata.items() if key not in (FUSED_ENTRY, "format")}
    notes = (f"{split_layers} fused layers were split into those of diffusers, exactly",) if split_layers else ()
    return PortableAdapter(components, family, kept, notes)


def _family(adapter: PortableAdapter, family: str) -> Family:
    if found := family or family_of(adapter):
        return family_named(found)
    raise RequestError(
        "The adapter's names and sizes don't tell what model it is for, and kohya's names depend on it. Give family= (or "
        f"--family), one of {', '.join(FAMILIES)}."
    )


def _parted(factors: Factors, place: Place, record: list[Part] | None) -> list[tuple[str, Factors]]:
    """Return (module, factors) of the layers that a file's layer is."""
    if len(place.modules) == 1:
        turned = place.swapped or _is_last_norm(place.modules[0], factors)
        return [(place.modules[0], swap_halves(factors) if turned else factors)]
    out, inside = factors.shape[0], factors.shape[1]
    sizes = [out // 3] * 3 if len(place.modules) == 3 else [inside] * 3 + [out - 3 * inside]
    if sum(sizes) != out or min(sizes) <= 0:
        raise CheckpointError(
            f"The layer that fuses {place.modules[0]!r} has {out} rows, which can't be split among its layers."
        )
    parts = split(factors, sizes, record)
    return [(module, part) for module, part in zip(place.modules, parts, strict=True) if part is not None]


def _is_last_norm(module: str, factors: Factors) -> bool:
    """Return True for the modulation of SD3's last block, whose two halves are swapped; in others it has six parts."""
    return module.endswith(".norm1_context.linear") and factors.shape[0] == 2 * factors.shape[1]


def _slots(
    components: Mapping[str, Mapping[str, Factors]], family: Family
) -> tuple[dict[str, list[Factors | None]], set[str]]:
    """Return the file's layer -> the layers it is of, and the names of those whose halves are swapped."""
    slots: dict[str, list[Factors | None]] = {}
    swapped: set[str] = set()
    lost = []
    for component, modules in components.items():
        for module, factors in modules.items():
            target: Written | None = written(component, module, family)
            if target is None:
                lost.append(f"{module!r} of the {component}")
                continue
            slots.setdefault(target.name, [None] * target.count)[target.place] = factors
            if target.swapped or _is_last_norm(module, factors):
                swapped.add(target.name)
    if lost:
        raise UnsupportedError(
            f"kohya's files of {family.name} have no name for {', '.join(lost[:3])}"
            + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
            + ". Write the diffusers format, or give the family that it is of."
        )
    return slots, swapped


def _sizes(parts: list[Factors | None]) -> list[int]:
    """Rows of the layers that one fuses; those without an adapter by the others' sizes."""
    present = [part for part in parts if part is not None]
    inside = present[0].shape[1]
    attention = [part.shape[0] for part in parts[:3] if part is not None]
    sizes = [(attention or [inside])[0]] * 3 + [4 * inside] * (len(parts) - 3)
    return [size if part is None else part.shape[0] for part, size in zip(parts, sizes, strict=True)]


def _check_holds(factors: Factors, name: str) -> None:
    if isinstance(factors, LoraFactors) and factors.bias is not None:
        raise UnsupportedError(
            f"{name!r} has a bias (PEFT's lora_bias), which kohya's format can't hold. Write the diffusers format."
        )


def _records(source: Source) -> dict[str, list[Part]]:
    """Return what the header says of joined layers: fused layer -> its parts. Anything odd is as if it said nothing."""
    if FUSED_ENTRY not in source.metadata:
        return {}
    raw = parse_json(source.metadata[FUSED_ENTRY].encode(), f"{FUSED_ENTRY} of {source.origin}")
    return {name: [Part(*entry) for entry in value] for name, value in raw.items() if _is_record(value)}


def _is_record(value: object) -> bool:
    def part(entry: object) -> bool:
        if type(entry) is not list or len(entry) != 5:
            return False
        rank, alpha, stabilised, dtype, scale = entry
        sized = type(rank) is int and 0 <= rank <= MAX_RANK and type(alpha) in (int, float) and abs(alpha) <= MAX_ALPHA
        return sized and type(stabilised) is bool and dtype in _DTYPES and type(scale) is float and scale != 0

    return type(value) is list and all(part(entry) for entry in value)
