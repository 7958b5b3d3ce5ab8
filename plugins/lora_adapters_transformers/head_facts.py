"""What a trained head's outputs mean: kept in the adapter's file beside the head, for the config of a merged model."""

from __future__ import annotations

import json
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from lora_adapters.adapter_config import parse_json
from lora_adapters.adapter_file import AdapterFile
from lora_adapters.errors import CheckpointError

from . import tasks

#: The entry in the safetensors metadata: a JSON object with any of "labels" (names in order), "problem_type" and
#: "pad_token_id".
ENTRY = "lora_adapters_transformers.head"
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
_MAX_CHARACTERS, _MAX_NAME, _MAX_ID = 2**18, 1000, 2**31


def to_save(model: nn.Module) -> dict[str, str]:
    """Return the metadata entry for a model; none for a model without a head of its own. What is too long is left out."""
    config = getattr(model, "config", None)
    # A wrapped timm classifier has its head inside the wrapped model.
    has_head = tasks.heads_to_train(model) or type(model).__name__ == "TimmWrapperForImageClassification"
    if not isinstance(config, PretrainedConfig) or not has_head:
        return {}
    facts = {
        "problem_type": getattr(config, "problem_type", None),
        "pad_token_id": getattr(config, "pad_token_id", None),
    }
    facts = {name: value for name, value in facts.items() if _CHECKS[name](value)}
    labels = _ordered(config.id2label)
    if _CHECKS["labels"](labels) and len(json.dumps(facts | {"labels": labels})) <= _MAX_CHARACTERS:
        facts["labels"] = labels
    return {ENTRY: json.dumps(facts)} if facts else {}


def _ordered(names: Any) -> Any:
    """Return the names of an id2label in order; None if its ids are not 0, 1, 2, ..."""
    by_id = {int(key): name for key, name in (names or {}).items() if str(key).isdecimal()}
    return [by_id[n] for n in range(len(by_id))] if by_id.keys() == set(range(len(names or {}))) else None


def read(file: AdapterFile) -> dict[str, Any]:
    """Return what a file says of its head: "labels", "problem_type" and "pad_token_id", each only if it is there.

    It is data of an untrusted file: bounded, typed, and put into fields of a config only.

    Raises:
        CheckpointError: the entry is not what `to_save` writes.
    """
    text = file.metadata.get(ENTRY)
    if text is None:
        return {}
    where = f"The entry {ENTRY} of {file.folder}"
    if len(text) > _MAX_CHARACTERS:
        raise CheckpointError(f"{where} is too long. Get the adapter from its author again.")
    found = parse_json(text.encode("utf-8", "replace"), where)
    for name, check in _CHECKS.items():
        if name in found and not check(found[name]):
            raise CheckpointError(
                f"{where} is damaged: {name} has no such values. Get the adapter from its author again."
            )
    return {name: found[name] for name in _CHECKS if name in found}


def _are_labels(value: Any) -> bool:
    return type(value) is list and len(value) > 0 and all(map(_is_name, value))


def _is_name(value: Any) -> bool:
    # Half a surrogate pair is a string in JSON and in Python, but no file can hold it.
    return type(value) is str and len(value) <= _MAX_NAME and not any("\ud800" <= c <= "\udfff" for c in value)


_CHECKS = {
    "problem_type": lambda value: type(value) is str and value in _PROBLEMS,
    "pad_token_id": lambda value: type(value) is int and 0 <= value < _MAX_ID,
    "labels": _are_labels,
}
