"""Which layers of which component a name in a kohya or LyCORIS file means, and the name of a layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .families import FAMILIES, Family, family_in_metadata
from .names import fill, flat
from .text_encoder_names import CLIP_NAMES, T5_NAMES
from .transformer_names import RELEASES
from .unet_names import DIFFUSERS_NAMES, LDM_NAMES, from_ldm, to_ldm

#: Dotted names of ComfyUI's and other trainers' files -> the same in kohya's.
_DOTTED = {
    "diffusion_model.": "lora_unet_",
    "text_encoders.clip_l.transformer.": "lora_te1_",
    "text_encoders.clip_g.transformer.": "lora_te2_",
    "text_encoders.t5xxl.transformer.": "lora_te3_",
}
#: LyCORIS' and other trainers' prefix of diffusers' names.
_DIFFUSERS_PREFIXES = ("lora_transformer_", "lycoris_")
_ANY_PREFIX = re.compile(r"(lora_unet|lora_te[123]?|lora_transformer|lycoris)_")


@dataclass(frozen=True)
class Place:
    """What a name means.

    Attributes:
        component: the pipeline's part.
        modules: the layers, in diffusers' names; several where the file's layer fuses them.
        swapped: the two halves of its rows are the other way round in diffusers.
    """

    component: str
    modules: tuple[str, ...]
    swapped: bool = False


def kohya_name(name: str) -> str:
    """Return a layer's name with kohya's prefix and underscores; other names as they are."""
    for dotted, prefix in _DOTTED.items():
        if name.startswith(dotted):
            return prefix + flat(name.removeprefix(dotted))
    return name


def is_kohya(names: Iterable[str]) -> bool:
    """Return True if names of layers are those of kohya's kind of files."""
    return all(_ANY_PREFIX.match(kohya_name(name)) and "." not in kohya_name(name) for name in names)


def family_by_names(names: Iterable[str], metadata: Mapping[str, str]) -> str:
    """Return the family that a file's layers are of, or its header says; "" where it may be SD1, SD2 or SDXL."""
    names = list(names)
    for family, words in (("flux", ("double_blocks_", "single_blocks_")), ("sd3", ("joint_blocks_",))):
        if any(name.startswith(tuple(f"lora_unet_{word}" for word in words)) for name in names):
            return family
    if any(
        name.startswith(prefix) and "single_transformer_blocks_" in name
        for name in names
        for prefix in _DIFFUSERS_PREFIXES
    ):
        return "flux"
    if found := family_in_metadata(metadata):
        return found
    if any(name.startswith(_DIFFUSERS_PREFIXES) and "transformer_blocks_" in name for name in names):
        if any("_attn2_" in name or name.startswith("lora_te2_") for name in names):
            return "sd3"
        return "flux"
    sgm = any(re.match(r"lora_unet_(input|output|middle)_blocks?_", name) for name in names)
    return "sdxl" if sgm or any(name.startswith("lora_te2_") for name in names) else ""


def find(name: str, family: str) -> Place | None:
    """Return what a name in kohya's form means, None if the family has no such layer.

    Args:
        name: such as "lora_unet_input_blocks_4_1_proj_in".
        family: its name; "" reads names of SD1, SD2 and SDXL.
    """
    prefixes = (
        FAMILIES[family or "sdxl"].prefixes if family else {**FAMILIES["sd1"].prefixes, **FAMILIES["sdxl"].prefixes}
    )
    for prefix in sorted(prefixes, key=len, reverse=True):
        if not name.startswith(prefix):
            continue
        component, rest = prefixes[prefix], name.removeprefix(prefix)
        if component.startswith("text_encoder"):
            found = CLIP_NAMES.dotted(rest) or T5_NAMES.dotted(rest)
            return Place(component, (found,)) if found else None
        if component == "unet":
            return _in_unet(rest)
        return _in_release(rest, family) if prefix == "lora_unet_" else _in_diffusers(rest, family)
    return _in_diffusers(name.removeprefix("lycoris_"), family) if name.startswith("lycoris_") else None


def _in_unet(rest: str) -> Place | None:
    found = DIFFUSERS_NAMES.dotted(rest)
    if found is None and (released := LDM_NAMES.dotted(rest)):
        found = from_ldm(released)
    return Place("unet", (found,)) if found else None


def _in_release(rest: str, family: str) -> Place | None:
    release = RELEASES[family]
    if found := release.released.match(rest):
        rename = release.by_released[found[0]]
        return Place("transformer", tuple(fill(name, found[1]) for name in rename.diffusers), rename.swapped)
    return _in_diffusers(rest, family)


def _in_diffusers(rest: str, family: str) -> Place | None:
    if family not in RELEASES:
        return _in_unet(rest)
    found = RELEASES[family].diffusers.dotted(rest)
    return Place("transformer", (found,)) if found else None


@dataclass(frozen=True)
class Written:
    """Where a layer goes in a file.

    Attributes:
        name: the file's layer.
        place: which of the layers that it fuses.
        count: how many it fuses.
        swapped: as in `Place`.
    """

    name: str
    place: int = 0
    count: int = 1
    swapped: bool = False


def written(component: str, module: str, family: Family) -> Written | None:
    """Return where a layer goes in a file of a family, None if the format has no name for it."""
    prefix = family.prefix_of(component)
    if prefix is None:
        return None
    if component.startswith("text_encoder"):
        return Written(prefix + flat(module)) if module in CLIP_NAMES or module in T5_NAMES else None
    if component == "unet":
        name = to_ldm(module) if family.name == "sdxl" else module if module in DIFFUSERS_NAMES else None
        return Written(prefix + flat(name)) if name else None
    release = RELEASES[family.name]
    found = release.diffusers.match(flat(module))
    if found is None or module not in release.diffusers:
        return None
    rename, place = release.by_diffusers[found[0]]
    return Written(prefix + flat(fill(rename.released, found[1])), place, len(rename.diffusers), rename.swapped)
