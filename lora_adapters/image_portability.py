"""Whether a PEFT folder loads in diffusers, ComfyUI and timm: what keeps it out, and what has to hold besides.

`portability.judge` puts these together. No other package is imported here; their rules are those of diffusers 0.42,
timm 1.0.31 and ComfyUI's comfy/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .adapter_config import WEIGHTS_NAME
from .adapter_file import NORM_ENTRY

if TYPE_CHECKING:
    from .adapter_file import AdapterFile

#: Denoisers whose pipelines read PEFT's names as diffusers' own (Flux2 in its blocks only).
_PIPELINE_READS = ("ErnieImageTransformer2DModel", "Flux2Transformer2DModel")
#: Denoisers whose pipelines take PEFT's names for those of the model's first release -> what they raise.
_PIPELINE_RAISES = {"FluxTransformer2DModel": "a KeyError", "Krea2Transformer2DModel": "a ValueError"}
_FLUX2_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
_DENOISER = re.compile(r"(down_blocks|mid_block|up_blocks|transformer_blocks|single_transformer_blocks)\.")
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks)\.")
_TEXT_ENCODER = re.compile(r"CLIPText|T5Encoder")
#: The one model of diffusers whose layers ComfyUI knows by PEFT's names, and which of them are sure to be known.
_COMFYUI_READS = "SD3Transformer2DModel"
_MERGE = "merge it into its base and give ComfyUI the merged model"
_COMFYUI_LAYER = re.compile(r"transformer_blocks\.\d+\.(attn|ff|ff_context)\..+")


@dataclass(frozen=True)
class TrainedOn:
    """The model an adapter was trained on, as far as its files say.

    Attributes:
        library: its package, "" if they don't say.
        name: its class, "" if they don't say.
    """

    library: str
    name: str

    @property
    def text_encoder(self) -> bool:
        """True for the text encoders that diffusers' loaders know."""
        return self.library == "transformers" and bool(_TEXT_ENCODER.match(self.name))

    def __str__(self) -> str:
        package = f"a model of {self.library}" if self.library else "a model its files do not name"
        return f"{self.name} ({package})" if self.name else package


def trained_on(file: AdapterFile) -> TrainedOn:
    """Say on what model an adapter was trained: by what its files say of the class, else by the layers' names."""
    module, name = file.config.base_class
    library = module.partition(".")[0]
    own = file.metadata.get("lora_adapters.base_class", "")
    name = name or (own if own.isidentifier() else "")
    if library not in ("diffusers", "timm", "transformers"):
        if file.config.get("task_type"):
            library = "transformers"
        elif file.config.get("base_model_name_or_path", "").startswith("timm/"):
            library = "timm"
        elif any(_DENOISER.match(layer) for layer in file.modules):
            library = "diffusers"
    return TrainedOn(library, name)


# ---- diffusers ------------------------------------------------------------------------------------------------------


def not_in_diffusers(file: AdapterFile) -> Iterator[str]:
    """Yield why `pipe.load_lora_weights(folder)` does not give what was trained."""
    on = trained_on(file)
    remedy = f"put it onto {_part(file, on)} with PeftModel.from_pretrained({_part(file, on)}, folder), in place"
    if _convertible(file):
        remedy = f"convert it (lora-adapters convert FOLDER FILE --to diffusers), or {remedy}"
    if on.library != "diffusers" and not on.text_encoder:
        yield f"it adapts {on}, and load_lora_weights loads adapters of a pipeline's denoiser and CLIP text encoders"
    elif on.name in _PIPELINE_READS:
        yield from (f"{reason}: {remedy}" for reason in _changed_by_the_pipeline(file, on))
    elif on.name in _PIPELINE_RAISES:
        yield (
            f"load_lora_weights of its pipeline raises {_PIPELINE_RAISES[on.name]}: it takes tensors named "
            f"base_model.model... for those of the model's first release; {remedy}"
        )
    else:
        yield (
            f"load_lora_weights loads nothing of it, with no more than a warning: its tensors are named "
            f"base_model.model..., not {_part(file, on).removeprefix('pipe.')}...; {remedy}"
        )


def notes_for_diffusers(file: AdapterFile) -> Iterator[str]:
    """Yield what else loads it in diffusers, and how right."""
    on = trained_on(file)
    if on.library == "diffusers":
        scales = _scales(file)
        yield (
            f"{_part(file, on)}.load_lora_adapter(folder, weight_name={WEIGHTS_NAME!r}, prefix='base_model.model') "
            + (f"loads it too, but at scale 1 instead of {scales}" if scales else "loads it too")
        )


def _changed_by_the_pipeline(file: AdapterFile, on: TrainedOn) -> Iterator[str]:
    if scales := _scales(file):
        yield f"load_lora_weights does not read the config, so it applies it at scale 1 instead of {scales}"
    if others := [key for key in file.header.tensors if "lora" not in key]:
        yield f"load_lora_weights raises a ValueError for tensors of modules or biases trained whole ({others[0]!r})"
    outside = [name for name in file.modules if not name.startswith(_FLUX2_BLOCKS)]
    if on.name.startswith("Flux2") and outside:
        yield f"load_lora_weights raises a ValueError for layers outside of the blocks ({outside[0]!r})"


def _part(file: AdapterFile, on: TrainedOn) -> str:
    """Return where in a pipeline the model is."""
    if on.text_encoder:
        return "pipe.text_encoder"
    unet = "UNet" in on.name or any(_UNET.match(name) for name in file.modules)
    return "pipe.unet" if unet else "pipe.transformer"


def _convertible(file: AdapterFile) -> bool:
    """Return True if the formats of diffusion models hold all of it."""
    return not (file.saved or file.biases or file.tokens)


def _scales(file: AdapterFile) -> str:
    """Return the factors of B @ A that are not 1, as text; "" if there are none."""
    scalings = file.config.scalings(file.config.ranks(file.modules)).values()
    other = sorted({scaling for scaling in scalings if abs(scaling - 1) > 1e-6})
    shown = [f"{scaling:g}" for scaling in other]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


# ---- ComfyUI --------------------------------------------------------------------------------------------------------


def not_in_comfyui(file: AdapterFile) -> Iterator[str]:
    """Yield why ComfyUI's LoRA loader does not apply the folder's weights file as it was trained."""
    on = trained_on(file)
    if on.library != "diffusers" and not on.text_encoder:
        yield f"it adapts {on}, and ComfyUI's loader patches diffusion models and their text encoders"
    elif on.name != _COMFYUI_READS:
        yield (
            "ComfyUI does not know its tensors' names (base_model.model...), logs 'lora key not loaded' for each and "
            "goes on without them: it reads kohya's and diffusers' names, and PEFT's for diffusers' SD3 only. "
            + ("Convert it: lora-adapters convert FOLDER FILE --to kohya" if _convertible(file) else _MERGE)
        )
    else:
        merge = "convert it (lora-adapters convert FOLDER FILE --to kohya)" if _convertible(file) else _MERGE
        if scales := _scales(file):
            yield f"ComfyUI does not read the config, so it applies it at scale 1 instead of {scales}: {merge}"
        factors = {key for module in file.modules.values() for part, key in module.keys.items() if part in "ab"}
        if others := [key for key in file.header.tensors if key not in factors]:
            yield f"ComfyUI leaves out every tensor but lora_A and lora_B, here {others[0]!r}: {merge}"
        if strange := [name for name in file.modules if not _COMFYUI_LAYER.fullmatch(name)]:
            yield f"ComfyUI may not know {strange[0]!r}, of SD3 attention and feed-forward layers are sure: {merge}"


def notes_for_comfyui(file: AdapterFile) -> Iterator[str]:
    """Yield how this was judged."""
    yield f"judged by ComfyUI's source, for {WEIGHTS_NAME} given to its LoRA loader"


# ---- timm -----------------------------------------------------------------------------------------------------------


def not_in_timm(file: AdapterFile) -> Iterator[str]:
    """Yield why it can't be put onto, and merged into, a model of `timm.create_model`."""
    on = trained_on(file)
    if on.name.startswith("TimmWrapper"):
        yield (
            f"it adapts {on.name}, transformers' wrapper: its layers, and a merged model's weights, are named "
            "timm_model..., which a model of timm.create_model has not. Load it onto the wrapper in transformers"
        )
    elif on.library != "timm":
        yield f"it adapts {on}, not a model of timm"


def notes_for_timm(file: AdapterFile, refused_by_peft: tuple[str, ...]) -> Iterator[str]:
    """Yield how to load it, and what the files do not hold."""
    on = trained_on(file)
    if on.library != "timm":
        return
    peft = "" if refused_by_peft else ", or PeftModel.from_pretrained(model, folder)"
    yield f"timm loads no adapters itself: lora_adapters.restore(model, folder){peft}; merged, the weights have timm's names"
    yield from (f"stock PEFT does not load it: {reason}" for reason in refused_by_peft)
    if on.name.startswith("Feature"):
        yield f"{on.name} is what features_only=True makes: its layers' names are not those of the plain model"
    if NORM_ENTRY not in file.metadata and any(module.kind.startswith("conv") for module in file.modules.values()):
        yield "the running statistics of BatchNorm are not in an adapter's files: trained in train mode, they are lost"
