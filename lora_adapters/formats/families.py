"""The families of models whose adapters go around in files: how kohya names their parts, and what UIs read of the header."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import RequestError
from .portable import PortableAdapter


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: "sd1", "sd2", "sdxl", "sd3", "flux".
        denoiser: its component, "unet" or "transformer".
        prefixes: kohya's prefix -> component, the one that is written first.
        version: ss_base_model_version. A1111 takes "sdxl_..." for SDXL, and any other adapter with a header for SD1 or SD2.
        architecture: modelspec.architecture, less "/lora".
        implementation: modelspec.implementation.
        resolution: modelspec.resolution.
    """

    name: str
    denoiser: str
    prefixes: Mapping[str, str]
    version: str
    architecture: str
    implementation: str
    resolution: str

    def prefix_of(self, component: str) -> str | None:
        """Return kohya's prefix of a component's layers, None if there is none."""
        return next((prefix for prefix, owner in self.prefixes.items() if owner == component), None)


_STABILITY = "https://github.com/Stability-AI/generative-models"
_ONE_ENCODER = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
_ALL = (
    Family("sd1", "unet", _ONE_ENCODER, "sd_v1", "stable-diffusion-v1", "diffusers", "512x512"),
    Family("sd2", "unet", _ONE_ENCODER, "sd_v2", "stable-diffusion-v2-512", "diffusers", "512x512"),
    Family(
        "sdxl",
        "unet",
        {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"},
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base",
        _STABILITY,
        "1024x1024",
    ),
    Family(
        "sd3",
        "transformer",
        {
            "lora_unet_": "transformer",
            "lora_te1_": "text_encoder",
            "lora_te2_": "text_encoder_2",
            "lora_te3_": "text_encoder_3",
            "lora_transformer_": "transformer",
        },
        "sd3",
        "stable-diffusion-3",
        "diffusers",
        "1024x1024",
    ),
    Family(
        "flux",
        "transformer",
        {
            "lora_unet_": "transformer",
            "lora_te1_": "text_encoder",
            "lora_te3_": "text_encoder_2",
            "lora_te_": "text_encoder",
            "lora_transformer_": "transformer",
        },
        "flux1",
        "flux-1",
        "https://github.com/black-forest-labs/flux",
        "1024x1024",
    ),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}


def family_named(name: str) -> Family:
    """Return a family.

    Raises:
        RequestError: there is none of this name.
    """
    if name not in FAMILIES:
        raise RequestError(f"There is no family {name[:40]!r} of models here. Give one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def family_in_metadata(metadata: Mapping[str, str]) -> str:
    """Return the family that a header names, "" if it names none."""
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "")
    if version.startswith("sdxl_") or architecture.startswith("stable-diffusion-xl"):
        return "sdxl"
    if version.startswith("sd3") or architecture.startswith("stable-diffusion-3"):
        return "sd3"
    if version.startswith("flux") or architecture.startswith(("flux-1", "flux.1")):
        return "flux"
    if metadata.get("ss_v2") == "True" or version.startswith("sd_v2") or architecture.startswith("stable-diffusion-v2"):
        return "sd2"
    if version.startswith("sd_v1") or architecture.startswith("stable-diffusion-v1"):
        return "sd1"
    return ""


def family_of(adapter: PortableAdapter) -> str:
    """Return the family that an adapter is of, by what it says and by its layers' names and sizes; "" if they don't tell."""
    if adapter.family:
        return adapter.family
    components = adapter.components
    if "transformer" in components:
        return _transformer_family(adapter)
    if "text_encoder_3" in components:
        return "sd3"
    names = components.get("unet", {})
    blocks = [int(found[1]) for name in names if (found := re.match(r"(?:down|up)_blocks\.(\d+)\.", name))]
    if any(block == 3 for block in blocks) or any(name.startswith("down_blocks.0.attentions.") for name in names):
        return _by_context(adapter, ("sd1", "sd2"))
    if "text_encoder_2" in components and names:
        return "sdxl"
    deep = any(re.search(r"\.transformer_blocks\.[1-9]", name) for name in names)
    if deep or any(name.startswith("add_embedding.") for name in names):
        return "sdxl"
    return _by_context(adapter, ("sd1", "sd2", "sdxl"))


def _transformer_family(adapter: PortableAdapter) -> str:
    names = adapter.components["transformer"]
    if any(
        name.startswith(("single_transformer_blocks.", "time_text_embed.guidance_embedder", "x_embedder"))
        for name in names
    ):
        return "flux"
    if (
        any(".attn2." in name or name.startswith("pos_embed.") for name in names)
        or "text_encoder_3" in adapter.components
    ):
        return "sd3"
    # Widths of Flux, and of SD3 and SD3.5: 64 values a head, as many heads as blocks.
    widths = {
        factors.shape[1] for name, factors in names.items() if name.endswith((".attn.to_q", ".attn.to_k", ".attn.to_v"))
    }
    return {3072: "flux", 1536: "sd3", 2432: "sd3"}.get(widths.pop(), "") if len(widths) == 1 else ""


def _by_context(adapter: PortableAdapter, possible: tuple[str, ...]) -> str:
    """Tell by the width of the text encoder that a UNet attends to, which is each family's own."""
    widths = {
        factors.shape[1]
        for name, factors in adapter.components.get("unet", {}).items()
        if name.endswith((".attn2.to_k", ".attn2.to_v"))
    }
    found = {768: "sd1", 1024: "sd2", 2048: "sdxl"}.get(widths.pop(), "") if len(widths) == 1 else ""
    return found if found in possible else ""


#: What a header says of the base model, and of the file itself, which is another one now.
_ABOUT_BASE = ("ss_v2", "ss_base_model_version", "ss_sd_model", "ss_new_sd_model", "modelspec.")
_ABOUT_FILE = ("modelspec.hash_sha256", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")


def header_entries(
    family: Family, adapter: PortableAdapter, module: str, arguments: Mapping[str, str]
) -> dict[str, str]:
    """Return the entries by which ComfyUI, A1111 and kohya's scripts know what an adapter is for, as kohya writes them.

    What the adapter's own file said of its training stays, except for hashes of the file it was.

    Args:
        family: what the file is written for.
        adapter: what is written.
        module: ss_network_module.
        arguments: ss_network_args, "" for none.
    """
    own = _about_network(adapter, module, arguments)
    about_base = {
        "ss_v2": str(family.name == "sd2"),
        "ss_base_model_version": family.version,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.architecture}/lora",
        "modelspec.implementation": family.implementation,
        "modelspec.title": "LoRA",
        "modelspec.resolution": family.resolution,
    }
    kept = {key: value for key, value in adapter.metadata.items() if key.startswith(("ss_", "modelspec."))}
    if family_in_metadata(kept) != family.name:
        # Written for another family than the source's: what that said of its base is wrong now.
        kept = {key: value for key, value in kept.items() if not key.startswith(_ABOUT_BASE)}
    kept = {key: value for key, value in kept.items() if key not in _ABOUT_FILE}
    return about_base | kept | own


def _about_network(adapter: PortableAdapter, module: str, arguments: Mapping[str, str]) -> dict[str, str]:
    ranks = [factors.rank for _, _, factors in adapter]
    alphas = [factors.scaling * factors.rank for _, _, factors in adapter]
    own = {
        "ss_network_module": module,
        "ss_network_dim": str(max(dict.fromkeys(ranks), key=ranks.count)),
        "ss_network_alpha": f"{max(dict.fromkeys(alphas), key=alphas.count):.17g}",
    }
    return own | ({"ss_network_args": json.dumps(dict(arguments))} if arguments else {})
