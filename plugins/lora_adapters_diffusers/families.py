"""The family of a pipeline, which formats of adapters ask for, told from the classes and configs of its parts."""

from __future__ import annotations

from typing import Any

from lora_adapters.errors import UnsupportedError
from lora_adapters.formats.families import FAMILIES
from lora_adapters.formats.unet_names import LAYERS_PER_BLOCK

_TRANSFORMERS = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
#: Width of the text encoder of Stable Diffusion 2.
_SD2_WIDTH = 1024


def pipeline_family(denoiser: Any, text_encoder: Any) -> str:
    """Return "sd1", "sd2", "sdxl", "sd3" or "flux", or "" for any other pipeline.

    Args:
        denoiser: the pipeline's UNet or transformer.
        text_encoder: its first text encoder, or None.
    """
    name = type(denoiser).__name__
    if name != "UNet2DConditionModel":
        return _TRANSFORMERS.get(name, "")
    if text_encoder is not None and not type(text_encoder).__name__.startswith("CLIPText"):
        return ""
    config = denoiser.config
    if getattr(config, "class_embed_type", None) is not None:  # unCLIP, AudioLDM, upscalers
        return ""
    if (added := getattr(config, "addition_embed_type", None)) is not None:
        return "sdxl" if added == "text_time" else ""
    second = getattr(config, "use_linear_projection", False) or config.cross_attention_dim == _SD2_WIDTH
    return "sd2" if second else "sd1"


def header_entries(denoiser: Any) -> dict[str, str]:
    """Return what a file's header says of the base model, as kohya writes it; nothing for a model of no known family."""
    family = FAMILIES.get(pipeline_family(denoiser, None))
    if family is None:
        return {}
    return {"ss_base_model_version": family.version, "modelspec.architecture": f"{family.architecture}/lora"}


def check_kohya_names(denoiser: Any, family: str, format: str) -> None:
    """Check that kohya's names mean the layers of this model.

    Raises:
        UnsupportedError: SDXL's names count blocks by the two resnets that the released model has in each.
    """
    layers = getattr(getattr(denoiser, "config", None), "layers_per_block", LAYERS_PER_BLOCK)
    if family == "sdxl" and format in ("kohya", "lycoris") and layers != LAYERS_PER_BLOCK:
        raise UnsupportedError(
            f"{format}'s names of SDXL's layers count {LAYERS_PER_BLOCK} resnets in a block, and this UNet has {layers}: "
            "other tools would take them for other layers. Save it as 'diffusers' or 'peft'."
        )
