"""What a saved adapter is: the facts its two files hold, as plain data. `lora-adapters inspect` prints them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from .adapter_config import WEIGHTS_NAME
from .adapter_file import PREFIX, VERSION_ENTRY, AdaptedModule, AdapterFile

if TYPE_CHECKING:
    import torch
    from torch import nn

#: PEFT's task type -> the task to load a model for.
TASK_OF_TYPE = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
#: Ends of the names of a classification head's last weight, whose rows are the labels.
_LABELS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")


@dataclass(frozen=True)
class LayerGroup:
    """The adapted layers whose names end alike.

    Attributes:
        name: last part of their names.
        kind: "linear", "conv1d", "conv2d", "conv3d", "embedding" or "parameter".
        count: how many.
        ranks, alphas, scalings: the different values among them, ascending.
        values: numbers in their adapters.
    """

    name: str
    kind: str
    count: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    scalings: tuple[float, ...]
    values: int


@dataclass(frozen=True)
class Norms:
    """Frobenius norms of scaling * B @ A over the layers: how far the adapter moves the weights.

    Attributes:
        mean, max: over all layers.
        largest: (layer, norm) of the five largest, descending.
    """

    mean: float
    max: float
    largest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class AdapterFacts:
    """What a saved adapter is. Text in it comes from the files: printable, but not to be trusted.

    Attributes:
        folder: where it lies.
        format: in which form.
        written_by: the package that wrote it and its version, as far as the files say.
        base_model, base_revision, base_class: the model it was trained on, as far as the files say.
        peft_type, task_type: PEFT's words.
        variants: what it is besides plain LoRA, such as "DoRA".
        layers: number of adapted layers.
        groups: them, by the last part of their names.
        trained_whole: modules trained and saved whole (modules_to_save).
        bias: which of the base's biases were trained ("none", "all", "lora_only").
        biases: how many.
        token_rows: embeddings of which single rows were trained.
        base_copies: modules whose base weight the file repeats.
        dtypes: dtype -> numbers stored in it.
        values: numbers in the file.
        file_bytes: size of the weights file.
        digest: True if the file holds this package's digest of its values, which reading it compares.
        metadata: the string entries of the weights file.
        norms: None when no layer's can be told.
    """

    folder: str
    format: str
    written_by: str
    base_model: str | None
    base_revision: str | None
    base_class: str | None
    peft_type: str
    task_type: str | None
    variants: tuple[str, ...]
    layers: int
    groups: tuple[LayerGroup, ...]
    trained_whole: tuple[str, ...]
    bias: str
    biases: int
    token_rows: tuple[str, ...]
    base_copies: tuple[str, ...]
    dtypes: Mapping[str, int]
    values: int
    file_bytes: int
    digest: bool
    metadata: Mapping[str, str]
    norms: Norms | None


def describe(file: AdapterFile, tensors: Mapping[str, torch.Tensor]) -> AdapterFacts:
    """Return the facts of a checked adapter.

    Args:
        file: what `inspect_adapter` returned.
        tensors: what `read_adapter` returned.
    """
    config, stored = file.config, file.header.tensors
    dtypes: dict[str, int] = {}
    for info in stored.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + prod(info.shape)
    metadata = {printable(key): printable(value) for key, value in file.metadata.items()}
    return AdapterFacts(
        folder=str(file.folder),
        format="PEFT (safetensors)",
        written_by=_writer(metadata, config.peft_version),
        base_model=config.get("base_model_name_or_path"),
        base_revision=config.get("revision"),
        base_class=metadata.get("lora_adapters.base_class"),
        peft_type=config.get("peft_type", "LORA"),
        task_type=config.get("task_type"),
        variants=_variants(config),
        layers=len(file.modules),
        groups=_groups(file),
        trained_whole=_owners(file.saved),
        bias=config.get("bias", "none"),
        biases=len(file.biases),
        token_rows=tuple(key.removeprefix(PREFIX).partition(".token_adapter.")[0] for key in file.tokens),
        base_copies=tuple(sorted(file.copies.values())),
        dtypes=dtypes,
        values=sum(dtypes.values()),
        file_bytes=(file.folder / WEIGHTS_NAME).stat().st_size,
        digest=file.verifiable,
        metadata=metadata,
        norms=_norms(file, tensors),
    )


def skeleton_for(file: AdapterFile, base: str, revision: str | None = None) -> nn.Module:
    """Return the base model that a file asks for, on the meta device: the right task and number of labels.

    Args:
        file: what `inspect_adapter` returned.
        base: name or folder of the base model.
        revision: its Hub revision.
    """
    from .api import skeleton

    options: dict[str, Any] = {}
    if task := TASK_OF_TYPE.get(file.config.get("task_type", "")):
        options["task"] = task
    if labels := [file.header.tensors[key].shape[0] for key in file.saved if key.endswith(_LABELS)]:
        options["num_labels"] = labels[0]
    return skeleton(base, revision=revision, **options)


def _writer(metadata: Mapping[str, str], peft_version: str) -> str:
    peft = f"PEFT {peft_version}" if peft_version else "PEFT"
    if VERSION_ENTRY in metadata:
        return f"lora_adapters {metadata[VERSION_ENTRY]} ({peft})"
    return peft if peft_version else "another tool, or an old PEFT"


def printable(text: str) -> str:
    """Return text that can't steer a terminal, of a bounded length."""
    return "".join(character if character.isprintable() else "?" for character in text[:500])


def _variants(config: Any) -> tuple[str, ...]:
    start = config.get("init_lora_weights", True)
    found = {
        "DoRA": config.get("use_dora"),
        "rank-stabilised": config.get("use_rslora"),
        "bias of B": config.get("lora_bias"),
        "activated LoRA": config.get("alora_invocation_tokens"),
        "QALoRA": config.get("use_qalora"),
        "VeLoRA": config.get("velora_config"),
        f"initialised with {start}": isinstance(start, str),
    }
    return tuple(name for name, true in found.items() if true)


def _groups(file: AdapterFile) -> tuple[LayerGroup, ...]:
    alphas, scalings = file.config.alphas(file.modules), _scalings(file)
    members: dict[tuple[str, str], list[str]] = {}
    for name, module in file.modules.items():
        members.setdefault((name.rpartition(".")[2], module.kind), []).append(name)
    return tuple(
        LayerGroup(
            name=last,
            kind=kind,
            count=len(names),
            ranks=_different(file.modules[name].rank for name in names),
            alphas=_different(alphas[name] for name in names),
            scalings=_different(scalings[name] for name in names),
            values=sum(prod(shape) for name in names for shape in file.modules[name].shapes.values()),
        )
        for (last, kind), names in members.items()
    )


def _scalings(file: AdapterFile) -> dict[str, float]:
    # By the config's ranks: the factors of expert weights (kind "parameter") hold several adapters of that rank.
    return file.config.scalings(file.config.ranks(file.modules))


def _different(values: Any) -> tuple[Any, ...]:
    return tuple(sorted(set(values)))


def _owners(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key.removeprefix(PREFIX).rpartition(".")[0] for key in keys))


def _norms(file: AdapterFile, tensors: Mapping[str, torch.Tensor]) -> Norms | None:
    from .norms import update_norm

    scalings = _scalings(file)

    def norm(name: str, module: AdaptedModule) -> float:
        # In double precision no finite factors of a file overflow.
        a, b = (tensors[module.keys[part]].double() for part in ("a", "b"))
        return update_norm(a, b, scalings[name]).item()

    found = {name: norm(name, module) for name, module in file.modules.items() if module.kind != "parameter"}
    if not found:
        return None
    largest = sorted(found.items(), key=lambda item: -item[1])[:5]
    return Norms(sum(found.values()) / len(found), largest[0][1], tuple(largest))
