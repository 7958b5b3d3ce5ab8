"""Whether a file of a diffusion model's adapter loads in other tools with the scaling it was trained with.

By the sources of diffusers 0.42 (loaders/lora_conversion_utils.py, utils/peft_utils.py) and ComfyUI (comfy/lora.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from .formats.factors import Factors
from .formats.portable import PortableAdapter
from .formats.source import open_source
from .portability import Verdict

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
_BLOCK = re.compile(r"(single_)?transformer_blocks\.")
_LYCORIS = ("LoHa", "LoKr", "Tucker")


def judge_portable(adapter: PortableAdapter, path: Path, format: str, target: str) -> Verdict:
    """Judge an adapter that `formats.read` returned.

    Args:
        adapter: it.
        path: where it was read from.
        format: the format it was in.
        target: one of `lora_adapters.portability.TARGETS`.
    """
    notes: tuple[str, ...] = ()
    if target in ("vllm", "timm"):
        reasons: Iterator[str] = iter([f"it adapts parts of a diffusion pipeline ({', '.join(adapter.components)})"])
    elif format == "peft":
        reasons = iter(_for_peft_folders(target))
    elif target == "peft":
        reasons = iter(
            ["it is no PEFT folder: lora-adapters convert FILE FOLDER --to peft makes one for each component"]
        )
    elif target == "comfyui":
        reasons, notes = (
            _not_in_comfyui(adapter, path, format),
            ("judged by ComfyUI's source, given to its LoRA loader",),
        )
    elif format in ("kohya", "lycoris"):
        reasons = _kohya_not_in_diffusers(adapter)
    else:
        reasons = _not_in_diffusers(adapter, path)
    return Verdict(target, tuple(reasons), notes)


def _for_peft_folders(target: str) -> list[str]:
    if target == "peft":
        return []
    to = "diffusers" if target == "diffusers" else "kohya"
    return [f"PEFT folders are not read there: lora-adapters convert FOLDER FILE --to {to}"]


def _not_in_comfyui(adapter: PortableAdapter, path: Path, format: str) -> Iterator[str]:
    if format in ("kohya", "lycoris"):
        return
    convert = "lora-adapters convert FILE OUT --to kohya"
    if other := sorted({f"{factors.scaling:g}" for _, _, factors in adapter if factors.scaling != 1}):
        scales = ", ".join(other[:3])
        yield f"ComfyUI does not read lora_adapter_metadata: it applies it at scale 1 instead of {scales}: {convert}"
    keys = open_source(path).shapes
    if any(key.startswith(("text_encoder.encoder.layers.", "text_encoder_2.encoder.layers.")) for key in keys):
        yield f"ComfyUI knows CLIP's layers by text_model.encoder only, not by the names of transformers 5: {convert}"


def _not_in_diffusers(adapter: PortableAdapter, path: Path) -> Iterator[str]:
    keys = open_source(path).shapes
    if any(key.endswith(".alpha") for key in keys) and "unet" in adapter.components:
        yield "load_lora_weights raises a ValueError for .alpha tensors in it: convert it to diffusers"
    if strange := [kind for kind in adapter.kinds if kind in _LYCORIS]:
        yield f"load_lora_weights does not read {' and '.join(strange)}: convert it to diffusers"
    yield from _text_encoders(adapter)


def _text_encoders(adapter: PortableAdapter) -> Iterator[str]:
    for component, modules in adapter.components.items():
        if not component.startswith("text_encoder"):
            continue
        if any(name.startswith("encoder.block.") for name in modules):
            yield f"load_lora_weights loads no adapters of T5 ({component}), without a word"
        elif not any(name.endswith(_ATTENTION) for name in modules):
            yield f"load_lora_weights raises a ValueError for a {component} without adapted attention"


def _kohya_not_in_diffusers(adapter: PortableAdapter) -> Iterator[str]:
    convert = "lora-adapters convert FILE OUT --to diffusers"
    if adapter.family == "sd3":
        yield f"load_lora_weights does not read kohya's names for SD3: {convert}"
    if strange := [kind for kind in adapter.kinds if kind in _LYCORIS]:
        yield f"load_lora_weights does not read {' and '.join(strange)} in kohya's names: {convert}"
    if "DoRA" in adapter.kinds:
        yield f"load_lora_weights leaves DoRA's magnitudes out, with no more than a warning: {convert}"
    if adapter.family == "flux":
        layers = adapter.components.get("transformer", {})
        if outside := [name for name in layers if not _BLOCK.match(name)]:
            yield f"load_lora_weights passes over layers outside of the blocks ({outside[0]!r}), without a word: {convert}"
    else:
        for component, modules in adapter.components.items():
            yield from (f"{reason}: {convert}" for reason in _minority(component, modules))
    if any(name.startswith("encoder.block.") for _, name, _ in adapter):
        yield "load_lora_weights loads no adapters of T5, without a word"


def _minority(component: str, modules: Mapping[str, Factors]) -> Iterator[str]:
    """Attention layers whose alpha is not the component's most frequent are given that one."""
    alphas = [factors.alpha for factors in modules.values()]
    most = max(dict.fromkeys(alphas), key=alphas.count)
    for name, factors in modules.items():
        if factors.alpha != most and name.endswith(_ATTENTION):
            yield (
                f"load_lora_weights gives {name!r} of the {component} the alpha of most layers, so that its scale is "
                f"{most / factors.rank:g} instead of {factors.scaling:g}"
            )
            return
