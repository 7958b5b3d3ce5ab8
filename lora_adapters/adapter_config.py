"""Reads adapter_config.json as untrusted data: typed, bounded, and nothing it names is imported or run."""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError, UnsupportedError
from .name_patterns import MAX_LENGTH, PatternMap
from .naming import saved_whole

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
#: What diffusers calls the file of an adapter of a pipeline.
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
MAX_CONFIG_BYTES = 2 * 2**20
MAX_RANK = 2**16
MAX_ALPHA = 1e6
_MAX_INT = 2**31

_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_INITS = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "lora_ga", "orthogonal", "mica")
#: What the numbers in the weights mean depends on these; base_model_name_or_path and the like may be edited freely.
_MEANING = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias"),
    *("fan_in_fan_out", "target_modules", "modules_to_save", "target_parameters", "trainable_token_indices"),
)

#: Initialisations that change the base's weights using data that a saved adapter does not hold.
CHANGED_BASE = ("corda", "lora_ga")

Check = Callable[[str, Any], Any]


def _bad(name: str, value: Any, wanted: str) -> CheckpointError:
    shown = repr(value)
    return CheckpointError(
        f"{CONFIG_NAME}: {name} must be {wanted}, got {shown[:60]}{'...' if len(shown) > 60 else ''}. "
        "Correct the file if you trust where it comes from, or download the adapter again."
    )


def _integer(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _bad(name, value, f"a whole number from {low} to {high}")
        return value

    return check


def _number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise _bad(name, value, f"a number from {low:g} to {high:g}")
        return value

    return check


def _boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise _bad(name, value, "true or false")
    return value


def _text(limit: int) -> Check:
    def check(name: str, value: Any) -> str:
        if type(value) is not str or len(value) > limit or not (value.isprintable() or not value):
            raise _bad(name, value, f"a printable string of at most {limit} characters")
        return value

    return check


def _one_of(*allowed: str) -> Check:
    def check(name: str, value: Any) -> str:
        if type(value) is not str or value not in allowed:
            raise _bad(name, value, f"one of {', '.join(allowed)}")
        return value

    return check


def _list(item: Check, limit: int = 100_000) -> Check:
    def check(name: str, value: Any) -> list[Any]:
        if type(value) is not list or len(value) > limit:
            raise _bad(name, value, f"a list of at most {limit} entries")
        return [item(name, entry) for entry in value]

    return check


def _mapping(item: Check, limit: int = 50_000) -> Check:
    def check(name: str, value: Any) -> dict[str, Any]:
        if type(value) is not dict or len(value) > limit:
            raise _bad(name, value, f"an object of at most {limit} entries")
        return {_module(name, key): item(f"{name}[{key[:60]!r}]", entry) for key, entry in value.items()}

    return check


def _either(*checks: Check) -> Check:
    def check(name: str, value: Any) -> Any:
        for one in checks[:-1]:
            try:
                return one(name, value)
            except CheckpointError:
                continue
        return checks[-1](name, value)

    return check


def _initialisation(name: str, value: Any) -> bool | str:
    if type(value) is bool or (type(value) is str and value in _INITS):
        return value
    if type(value) is str and re.fullmatch(r"pissa_niter_[0-9]{1,3}", value):
        return value
    raise _bad(name, value, f"true, false, pissa_niter_N or one of {', '.join(_INITS)}")


def _object(**fields: Check) -> Check:
    def check(name: str, value: Any) -> dict[str, Any]:
        if type(value) is not dict or set(value) - set(fields):
            raise _bad(name, value, f"an object of {', '.join(fields)}")
        return {key: fields[key](f"{name}.{key}", entry) for key, entry in value.items()}

    return check


_module = _text(4096)
_name_or_names = _either(_list(_module), _text(MAX_LENGTH))
_indices = _list(_integer(0, _MAX_INT))

#: Fields handed on to LoraConfig -> how they are checked. None (null) is allowed where PEFT allows it.
FIELDS: Mapping[str, Check] = {
    "r": _integer(1, MAX_RANK),
    "lora_alpha": _number(-MAX_ALPHA, MAX_ALPHA),
    "lora_dropout": _number(0, 1),
    "bias": _one_of("none", "all", "lora_only"),
    "rank_pattern": _mapping(_integer(1, MAX_RANK)),
    "alpha_pattern": _mapping(_number(-MAX_ALPHA, MAX_ALPHA)),
    "target_modules": _name_or_names,
    "exclude_modules": _name_or_names,
    "target_parameters": _list(_module, 256),
    "modules_to_save": _list(_module, 256),
    "layers_to_transform": _either(_indices, _integer(0, _MAX_INT)),
    "layers_pattern": _name_or_names,
    "fan_in_fan_out": _boolean,
    "use_rslora": _boolean,
    "use_dora": _boolean,
    "lora_bias": _boolean,
    "use_qalora": _boolean,
    "qalora_group_size": _integer(1, _MAX_INT),
    "ensure_weight_tying": _boolean,
    "inference_mode": _boolean,
    "init_lora_weights": _initialisation,
    "loftq_config": _object(loftq_bits=_integer(1, 8), loftq_iter=_integer(1, 100)),
    "trainable_token_indices": _either(_indices, _mapping(_indices)),
    "alora_invocation_tokens": _indices,
    "velora_config": _object(
        num_groups=_integer(1, MAX_RANK),
        scale=_number(1e-9, 1e9),
        init_type=_one_of("batch_average", "batch_average_once", "random"),
    ),
    "task_type": _one_of(*_TASKS),
    "base_model_name_or_path": _text(4096),
    "revision": _text(256),
    "peft_type": _one_of("LORA"),
}
_NOT_NULL = ("r", "lora_alpha", "lora_dropout", "bias", "peft_type")
#: Never acted on. auto_mapping names a class to import (PEFT writes it whenever task_type is unset); the others are
#: about how the adapter was initialised before it was trained.
DROPPED = ("auto_mapping", "runtime_config", "peft_version", "eva_config", "corda_config", "lora_ga_config")
#: Change the model or the forward in ways only stock PEFT implements.
_PEFT_ONLY = ("layer_replication", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora")


@dataclass(frozen=True)
class AdapterConfigData:
    """A checked adapter_config.json.

    Attributes:
        values: LoraConfig field -> checked value, of the fields the file gives.
        meaning: digest over the fields that say what the weights mean (see `meaning_digest`).
        peft_version: the PEFT that wrote it, as it says; "" when it does not.
        base_class: module and name of the base's class, as it says (never imported); "" each when it does not.
    """

    values: Mapping[str, Any]
    meaning: str
    peft_version: str = ""
    base_class: tuple[str, str] = ("", "")

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a field; `default` when the file leaves it out or says null."""
        value = self.values.get(name)
        return default if value is None else value

    @property
    def r(self) -> int:
        """Rank of modules that rank_pattern does not name."""
        return self.get("r", 8)

    @property
    def lora_alpha(self) -> float:
        """Alpha of modules that alpha_pattern does not name."""
        return self.get("lora_alpha", 8)

    def ranks(self, modules: Collection[str]) -> dict[str, int]:
        """Rank of each module by `r` and `rank_pattern`, PEFT's matching rule, in bounded time."""
        return PatternMap[int](self.get("rank_pattern", {})).look_up(modules, self.r)

    def alphas(self, modules: Collection[str]) -> dict[str, float]:
        """Alpha of each module by `lora_alpha` and `alpha_pattern`."""
        return PatternMap[float](self.get("alpha_pattern", {})).look_up(modules, self.lora_alpha)

    def scalings(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Factor of B @ A for each of `ranks` (module -> rank)."""
        root = math.sqrt if self.get("use_rslora") else int
        return {name: alpha / root(ranks[name]) for name, alpha in self.alphas(ranks).items()}

    def expected_targets(self, candidates: Collection[str]) -> set[str] | None:
        """Modules among `candidates` (the names a model has) that the config says are adapted.

        None when that can't be told in bounded time or from names alone ("all-linear", no target_modules, a pattern
        outside the supported syntax): the tensors in the file are then the only source.
        """
        targets = self.get("target_modules")
        if not targets or targets == "all-linear":
            return None
        try:
            found = _selected(candidates, targets)
            if exclude := self.get("exclude_modules"):
                found -= _selected(found, exclude)
        except CheckpointError:
            return None
        found = {name for name in found if not saved_whole(self.get("modules_to_save", []), name)}
        return self._in_layers(found)

    def _in_layers(self, names: set[str]) -> set[str] | None:
        layers, patterns = self.get("layers_to_transform"), self.get("layers_pattern", [])
        if layers is None:
            return names
        layers = {layers} if isinstance(layers, int) else set(layers)
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not all(pattern.isidentifier() for pattern in patterns):
            return None
        return {name for name in names if _layer_index(name, patterns) in layers}

    def check_base_unchanged(self) -> None:
        """Raise UnsupportedError if the initialisation changed the base's weights in a way that can't be repeated."""
        if (start := self.get("init_lora_weights")) in CHANGED_BASE:
            raise UnsupportedError(
                f"The adapter was initialised with {start!r}, which changed the base's weights using data the file "
                "does not hold. Save it again with PEFT's path_initial_model_for_weight_conversion, then restore that."
            )

    def to_lora_config(self, inference_mode: bool = False, **exact: Any) -> Any:
        """A real `peft.LoraConfig`. `exact` replaces fields (target_modules, r, rank_pattern ... with exact names).

        Raises:
            UnsupportedError: the initialisation changed the base's weights in a way that needs its data to repeat.
            CheckpointError: PEFT refuses the combination of fields.
        """
        from peft import LoraConfig

        values = {key: value for key, value in self.values.items() if value is not None and key != "peft_type"}
        self.check_base_unchanged()
        if values.get("init_lora_weights") == "eva":
            values["init_lora_weights"] = True
        values |= exact | {"inference_mode": inference_mode}
        try:
            return LoraConfig(**values)
        except (TypeError, ValueError, ImportError) as error:
            raise CheckpointError(f"{CONFIG_NAME}: PEFT refuses these settings: {error}") from error


def _selected(names: Collection[str], targets: str | list[str]) -> set[str]:
    if isinstance(targets, str):
        matched = PatternMap({targets: True}, suffix=False).look_up(names, False)
        return {name for name, found in matched.items() if found}
    wanted = set(targets)
    return {name for name in names if any(end in wanted for end in _endings(name))}


def _endings(name: str) -> list[str]:
    return [name] + [name[index + 1 :] for index, character in enumerate(name) if character == "."]


def contains(owners: Collection[str], name: str) -> bool:
    """True if `name` is, or lies inside, a module whose dotted name ends with one of `owners` (whole components)."""
    return any(f".{owner}." in f".{name}." for owner in owners)


def _layer_index(name: str, patterns: Collection[str]) -> int | None:
    parts = name.split(".")
    for index in range(len(parts) - 2, 1, -1):
        if parts[index].isdecimal() and (not patterns or parts[index - 1] in patterns):
            return int(parts[index])
    return None


def meaning_digest(raw: Mapping[str, Any]) -> str:
    """sha256 over the fields without which the weights mean something else (ranks, alphas, targets, variants)."""
    kept = {key: raw.get(key) for key in _MEANING}
    kept = {key: sorted(value) if isinstance(value, list | set | tuple) else value for key, value in kept.items()}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_bounded(path: Path, limit: int) -> bytes:
    """Bytes of a regular file of at most `limit` bytes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file. Give the folder of a saved adapter.")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. Give the folder that a save wrote.") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}.") from error
    if len(data) > limit:
        raise CheckpointError(f"{path} is larger than {limit} bytes, so it is no such file of a real adapter.")
    return data


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object without duplicate names, NaN or Infinity.

    Raises:
        CheckpointError: anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice in one object")
        return result

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not a JSON number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: {str(error)[:200]}. Copy or download it again.") from None
    if type(value) is not dict:
        raise CheckpointError(f"{where} is damaged: it must hold a JSON object. Copy or download it again.")
    return value


def parse_config(data: bytes) -> AdapterConfigData:
    """Check the bytes of an adapter_config.json. See `read_config`."""
    raw = parse_json(data, CONFIG_NAME)
    kind = raw.get("peft_type")
    if type(kind) is str and kind != "LORA":
        raise UnsupportedError(
            f"The adapter is of PEFT type {kind[:40]!r}; only LORA is restored here. Load it with "
            "PeftModel.from_pretrained."
        )
    if kind is None:
        raise CheckpointError(f"{CONFIG_NAME} has no peft_type. It must say LORA, as PEFT's save_pretrained writes it.")
    values = {}
    for name, value in raw.items():
        if name in FIELDS:
            values[name] = None if value is None and name not in _NOT_NULL else FIELDS[name](name, value)
        else:
            _check_unused(name, value)
    version = raw.get("peft_version")
    if type(version) is not str or len(version) > 64 or not version.isprintable():
        version = ""
    return AdapterConfigData(values, meaning_digest(raw), version, _base_class(raw.get("auto_mapping")))


def _base_class(mapping: Any) -> tuple[str, str]:
    """Module and class that auto_mapping names, where they can be such names."""
    named = mapping if type(mapping) is dict else {}
    texts = [named.get(key) for key in ("parent_library", "base_model_class")]
    module, name = (text if type(text) is str and len(text) <= 256 and _dotted(text) else "" for text in texts)
    return module, name


def _dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _check_unused(name: str, value: Any) -> None:
    if name in DROPPED or value is None or value is False or value in ("", [], {}):
        return
    if name == "megatron_core" and value == "megatron.core":
        return
    if name in ("megatron_core", "megatron_config"):
        raise CheckpointError(
            f"{CONFIG_NAME}: {name} names code to import, which restoring never does. Remove the field, or load the "
            "adapter with stock PEFT if you trust it."
        )
    if name in _PEFT_ONLY:
        raise UnsupportedError(
            f"{CONFIG_NAME}: {name} is only implemented by stock PEFT. Load it with PeftModel.from_pretrained, then "
            "call lora_adapters.optimize(model)."
        )
    raise CheckpointError(
        f"{CONFIG_NAME}: unknown field {name[:60]!r}. It may change what the weights mean; if a newer PEFT wrote it, "
        "update lora_adapters, or remove the field when you know that it does not matter."
    )


def read_config(path: str | Path) -> AdapterConfigData:
    """Read adapter_config.json (the file, or the folder that holds it) as untrusted data.

    Returns:
        Checked values. Nothing the file names has been imported, and no pattern in it has been run.

    Raises:
        CheckpointError: missing, larger than 2 MiB, not JSON, a field of the wrong type or out of bounds, or a field
            that names code to import.
        UnsupportedError: another PEFT method than LoRA, or a variant that only stock PEFT implements.
    """
    path = Path(path)
    return parse_config(read_bounded(path / CONFIG_NAME if path.is_dir() else path, MAX_CONFIG_BYTES))
