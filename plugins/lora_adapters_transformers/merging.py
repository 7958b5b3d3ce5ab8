"""Merging a saved adapter into a checkpoint: which model its base is, and what a plain model's folder holds."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lora_adapters.adapter_file import PREFIX, AdapterFile
from lora_adapters.error_text import first_line
from lora_adapters.errors import CheckpointError, UnsupportedError
from lora_adapters.inspection import TASK_OF_TYPE

from . import head_facts, tasks
from .loading import auto_class, on_meta, read_config

#: What tokenizers and processors of transformers read, each group whole from one folder: files that say there is one,
#: and patterns of all the group's files. None of them is code, and none is read here.
_BESIDE: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("tokenizer_config.json", "tokenizer.json"),
        (
            *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "*_vocab.json"),
            *("additional_chat_templates/*", "merges.txt", "*.model", "*.spm", "*.bpe", "*.tiktoken", "*.tokenizer"),
            *("bpe.codes", "dict.txt", "normalizer.json", "emoji.json", "byte_maps.json", "word_*.json"),
        ),
    ),
    (
        ("preprocessor_config.json", "processor_config.json"),
        ("*processor_config.json", "audio_tokenizer_config.json"),
    ),
)
#: transformers' own limit is 50 GB; a reader that loads file by file needs less memory with this one.
_SHARD = "5GB"


def adapter_options(
    name: str,
    file: AdapterFile,
    *,
    revision: str | None,
    trust_remote_code: bool,
    task: str | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Return the options of `load` that give the model a saved adapter was trained on: its task and its labels.

    The names of the labels, the problem type and the padding token are those of the training run, if the file has them.

    Args:
        name, revision, trust_remote_code: the base, as for `load`.
        file: the adapter.
        task: one of `loading.TASKS`; None takes the one that the adapter's config names.
        **given: other options of `load`; these stay as they are.

    Raises:
        UnsupportedError: the base is stored quantized, or there is no such model for the task.
        CheckpointError: what the file says of its head is damaged, or does not fit the base.
    """
    config = read_config(name, given, {"revision": revision, "trust_remote_code": trust_remote_code})
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(
            f"{name!r} is stored quantized, and a merged model must not be: quantizing the sum again would lose most of "
            "a small update. Give the checkpoint it was quantized from."
        )
    task = task or _task(config, file.config.get("task_type"), trust_remote_code)
    known = head_facts.read(file)
    options = _set_in_training(config, known) | given | ({} if task is None else {"task": task})
    if "num_labels" in given or "id2label" in given:
        return options
    labels = _labels(config, task, file, trust_remote_code)
    if labels is None:
        return options
    if labels != config.num_labels:
        # Where the base has a head of its own, that one has other classes: the adapter's takes its place.
        options |= {"num_labels": labels, "ignore_mismatched_sizes": True}
    names = known.get("labels", ())
    if len(names) == labels:
        options.pop("num_labels", None)
        options |= {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    return options


def _set_in_training(config: PretrainedConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the base's config, but for the labels, that were different when the head was trained."""
    fields = {n: known[n] for n in ("problem_type", "pad_token_id") if n in known and hasattr(config, n)}
    words = getattr(tasks.text_config(config), "vocab_size", None)
    if words is not None and fields.get("pad_token_id", 0) >= words:
        raise CheckpointError(
            f"The adapter was trained with the padding token {fields['pad_token_id']}, and this base knows {words} tokens. "
            "Give the base that the adapter was trained on."
        )
    return {name: value for name, value in fields.items() if getattr(config, name) != value}


def _skeleton(config: PretrainedConfig, task: str | None, trust_remote_code: bool) -> PreTrainedModel:
    return on_meta(auto_class(config, task), config, torch.float32, trust_remote_code)


def _task(config: PretrainedConfig, wanted: str | None, trust_remote_code: bool) -> str | None:
    """Return the task whose model PEFT's task type means; None if it is the one the checkpoint itself names."""
    if wanted is None or tasks.task_type(_skeleton(config, None, trust_remote_code)) == wanted:
        return None
    return TASK_OF_TYPE[wanted]


def _labels(config: PretrainedConfig, task: str | None, file: AdapterFile, trust_remote_code: bool) -> int | None:
    """Return the number of labels of the head that the file holds; None if it holds none."""
    if not file.saved:
        return None
    # Heads have many names and layouts. The dimensions that follow num_labels are those that differ between two models.
    shapes = []
    for labels in (11, 13):
        probed = copy.deepcopy(config)
        probed.num_labels = labels
        weights = _skeleton(probed, task, trust_remote_code).state_dict()
        shapes.append({key: tuple(weight.shape) for key, weight in weights.items()})
    for key, shape in shapes[0].items():
        follows = [n for n, pair in enumerate(zip(shape, shapes[1].get(key, ()), strict=False)) if pair == (11, 13)]
        if follows and f"{PREFIX}{key}" in file.saved:
            found = file.header.tensors[f"{PREFIX}{key}"].shape
            return found[follows[0]] if len(found) == len(shape) else None
    return None


def beside(
    name: str, adapter: str, *, revision: str | None, adapter_revision: str | None, trust_remote_code: bool
) -> dict[str, Path]:
    """Return name -> file of the tokenizer's and the processor's files, from the adapter's folder if it holds them.

    Args:
        name, revision: the base.
        adapter, adapter_revision: the adapter.
        trust_remote_code: also take Python files of the base, which such a tokenizer may need.
    """
    patterns = [pattern for _, group in _BESIDE for pattern in group]
    base, other = _folder(name, revision, [*patterns, "*.py"]), _folder(adapter, adapter_revision, patterns)
    found: dict[str, Path] = {}
    for marks, group in _BESIDE:
        theirs = any((other / mark).is_file() for mark in marks)
        found |= _matching(other if theirs else base, group, links=not theirs)
    return _matching(base, ("*.py",), links=True) | found if trust_remote_code else found


def _folder(name: str, revision: str | None, patterns: list[str]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # Its errors share no base class: HTTP, validation, cache, offline, disk.
        reason = first_line(error)[:300]
        raise CheckpointError(f"The tokenizer's files of {name!r} can't be had from the Hub: {reason}") from error


def _matching(folder: Path, patterns: tuple[str, ...], links: bool) -> dict[str, Path]:
    """Return name -> file. A link that leaves an adapter's folder could publish any file of this machine."""
    files = {path.relative_to(folder).as_posix(): path for path in (*folder.glob("*"), *folder.glob("*/*"))}
    places = [folder.resolve(), *(p.parent / "blobs" for p in folder.resolve().parents if p.name == "snapshots")]
    return {
        name: path
        for name, path in sorted(files.items())
        if path.is_file()
        and any(fnmatch.fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns)
        and (links or any(path.resolve().is_relative_to(place) for place in places))
    }


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a plain model as `from_pretrained` reads it."""
    model.save_pretrained(folder, max_shard_size=_SHARD)
