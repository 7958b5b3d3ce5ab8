"""Whether a saved adapter loads elsewhere and means the same there, judged from its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .adapter_config import CHANGED_BASE, CONFIG_NAME
from .adapter_file import HELD_TWICE_ENTRY, PREFIX, VERSION_ENTRY, AdapterFile
from .image_portability import (
    not_in_comfyui,
    not_in_diffusers,
    not_in_timm,
    notes_for_comfyui,
    notes_for_diffusers,
    notes_for_timm,
)
from .staging import interrupted_config

if TYPE_CHECKING:
    from torch import nn

#: What an adapter can be judged for.
TARGETS = ("peft", "diffusers", "vllm", "comfyui", "timm")

#: vLLM's LoRA loader as of 0.33: ranks an engine can be started with, its default, initialisations it takes, and the
#: base weights beside an adapter that it knows to skip.
VLLM_RANKS, VLLM_DEFAULT_RANK = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16
_VLLM_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_VLLM_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_VLLM_HEADS = ("classifier", "score")


@dataclass(frozen=True)
class Verdict:
    """Whether an adapter loads in a target and computes the same there.

    Attributes:
        target: one of `TARGETS`.
        reasons: why not; none means that it does.
        notes: what has to hold besides, which the files can't tell.
    """

    target: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def loads(self) -> bool:
        """True if nothing speaks against it."""
        return not self.reasons


def judge(
    file: AdapterFile, target: str, base: nn.Module | None = None, max_lora_rank: int = VLLM_DEFAULT_RANK
) -> Verdict:
    """Judge a checked adapter.

    Args:
        file: what `inspect_adapter` returned.
        target: one of `TARGETS`: "peft" (PeftModel.from_pretrained, 0.21), "diffusers" (a pipeline's load_lora_weights,
            0.42), "vllm" (0.33), "comfyui" (its LoRA loader, given the weights file), or "timm" (onto a model of
            timm.create_model, by what loads adapters there).
        base: the base model, on any device, meta too; it tells more about convolutions.
        max_lora_rank: what the vLLM engine is started with.
    """
    in_peft = tuple(_not_in_peft(file, base))
    if target == "peft":
        reasons, notes = in_peft, _notes_for_peft(file, base)
    elif target == "diffusers":
        # Where its own loaders fail, PEFT is the way.
        reasons, notes = (*not_in_diffusers(file), *in_peft), notes_for_diffusers(file)
    elif target == "vllm":
        reasons, notes = _not_in_vllm(file, max_lora_rank), _notes_for_vllm(file)
    elif target == "comfyui":
        reasons, notes = not_in_comfyui(file), notes_for_comfyui(file)
    else:
        reasons, notes = not_in_timm(file), notes_for_timm(file, in_peft)
    return Verdict(target, (*_elsewhere(file), *reasons), tuple(notes))


def _elsewhere(file: AdapterFile) -> Iterator[str]:
    """Yield what keeps an adapter from meaning the same in any other tool."""
    if interrupted_config(file.folder):
        yield (
            f"its save was interrupted, and {CONFIG_NAME} is still that of an earlier one, which only "
            "lora_adapters knows to pass over: save it again"
        )
    if twice := file.metadata.get(HELD_TWICE_ENTRY):
        yield f"{twice.split(',')[0]!r} is one module in several places, and only lora_adapters adapts it in all of them"
    if (start := file.config.get("init_lora_weights")) in CHANGED_BASE:
        yield f"it was initialised with {start!r}, which changed the base's weights using data the file does not hold"


def _convolutions(file: AdapterFile) -> list[str]:
    return [name for name, module in file.modules.items() if module.kind.startswith("conv")]


def _maybe_shared(file: AdapterFile) -> list[str]:
    """Return the convolutions whose groups, if they have any, share one A, as in our layers.

    PEFT's own layers divide B's ranks among the groups, and carry out DoRA.
    """
    if VERSION_ENTRY not in file.metadata or file.config.get("use_dora"):
        return []
    return [name for name in _convolutions(file) if file.modules[name].shapes["b"][1] == file.modules[name].rank]


def _not_in_peft(file: AdapterFile, base: nn.Module | None) -> Iterator[str]:
    if file.config.get("init_lora_weights") == "loftq" and not file.config.get("loftq_config"):
        yield f"it was initialised with 'loftq', which PEFT repeats when loading, and {CONFIG_NAME} has no loftq_config"
    modules = {} if base is None else dict(base.named_modules())
    if grouped := [name for name in _maybe_shared(file) if getattr(modules.get(name), "groups", 1) > 1]:
        yield (
            f"{grouped[0]!r} is a convolution with groups ({len(grouped)} such layers), for which PEFT's adapters have "
            "other shapes: merge it into the base instead"
        )


def _notes_for_peft(file: AdapterFile, base: nn.Module | None) -> Iterator[str]:
    if base is None and _maybe_shared(file):
        yield "adapters on convolutions with groups > 1 do not load in PEFT; give the base model to tell"
    if file.config.get("init_lora_weights") == "loftq":
        yield "PEFT repeats LoftQ on the base when loading, which takes a GPU"
    if file.copies:
        yield f"PEFT overwrites the base weight of {', '.join(file.copies.values())} with the file's copy"


def _not_in_vllm(file: AdapterFile, max_lora_rank: int) -> Iterator[str]:
    config = file.config
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if name not in config.values]:
        yield f"vLLM wants {', '.join(missing)} in {CONFIG_NAME}"
    yield from _vllm_rank(max([config.r, *config.get("rank_pattern", {}).values()]), max_lora_rank)
    if convolutions := _convolutions(file):
        yield f"vLLM adapts linear and embedding layers only: {convolutions[0]!r} is a convolution"
    unsupported = {
        "DoRA": config.get("use_dora"),
        "a bias of B (lora_bias)": config.get("lora_bias"),
        "trained biases": config.get("bias", "none") != "none",
        "trained token rows": file.tokens,
        "activated LoRA": config.get("alora_invocation_tokens"),
        "QALoRA": config.get("use_qalora"),
        "VeLoRA": config.get("velora_config"),
    }
    yield from (f"vLLM does not support {what}" for what, there in unsupported.items() if there)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in (*_VLLM_STARTS, *CHANGED_BASE):
        yield (
            f"it was initialised with {start!r}, which changed the base's weights, and vLLM does not repeat that: save "
            "it with PEFT's path_initial_model_for_weight_conversion"
        )
    if copies := [key for key in file.copies if not key.endswith(_VLLM_COPIES)]:
        yield f"vLLM does not know the copy of a base weight {copies[0]!r}: remove it from the file"
    yield from _vllm_heads(file)
    odd = [
        n
        for n, m in file.modules.items()
        if m.kind == "parameter" and not f".{n}".endswith((".experts", ".experts.base_layer"))
    ]
    if odd:
        yield f"vLLM reads adapters on parameters for experts only: {odd[0]!r} is something else"


def _vllm_rank(rank: int, allowed: int) -> Iterator[str]:
    if rank > VLLM_RANKS[-1]:
        yield f"rank {rank} is more than any vLLM engine takes ({VLLM_RANKS[-1]})"
    elif rank > allowed:
        enough = next(choice for choice in VLLM_RANKS if choice >= rank)
        yield f"rank {rank} is more than the engine's max_lora_rank of {allowed}: start it with --max-lora-rank {enough}"


def _vllm_heads(file: AdapterFile) -> Iterator[str]:
    wanted = [name for name in file.config.get("modules_to_save", []) if name not in _VLLM_HEADS]
    owners = {key.removeprefix(PREFIX).rpartition(".")[0] for key in file.saved}
    strange = sorted(owner for owner in owners if owner.rpartition(".")[2] not in _VLLM_HEADS)
    if wanted or strange:
        yield (
            f"of modules trained whole vLLM takes one classification head named classifier or score, not "
            f"{(wanted or strange)[0]!r}"
        )
    elif len(owners) > 1:
        yield f"vLLM takes one classification head, not {' and '.join(sorted(owners))}"


def _notes_for_vllm(file: AdapterFile) -> Iterator[str]:
    yield "judged by the rules of vLLM 0.33; the engine must support LoRA for this model, and these layers of it"
    if any(module.kind == "embedding" for module in file.modules.values()) or "lm_head" in file.modules:
        yield "vLLM adapts embeddings and heads for some models only"
    if file.config.get("rank_pattern") or file.config.get("alpha_pattern"):
        yield "ranks or alphas differ between layers: older vLLM releases apply one scale to all of them without a word"
    if file.saved:
        yield "older vLLM releases refuse classification heads"
