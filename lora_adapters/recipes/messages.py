"""pydantic's errors in words of somebody who writes a recipe: one line for each thing that is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from .sections import Recipe, Section
from .yaml_text import KeyPath

#: What other tools call a key -> what it is here (with its section).
_ELSEWHERE = {
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "target_modules": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "use_dora": "adapter.dora",
    "use_rslora": "adapter.rslora",
    "init_lora_weights": "adapter.init",
    "lr": "training.learning_rate",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "lr_scheduler_type": "training.schedule",
    "lr_scheduler": "training.schedule",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "optim": "training.optimizer",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "max_seq_length": "training.max_length",
    "cutoff_len": "training.max_length",
    "sequence_len": "training.max_length",
    "sample_packing": "training.packing",
    "logging_steps": "training.log_every",
    "save_steps": "training.save_every",
    "eval_steps": "training.eval_every",
    "save_total_limit": "training.keep_checkpoints",
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "torch_dtype": "model.dtype",
    "dataset": "data.train",
    "train_file": "data.train",
    "eval_dataset": "data.eval",
    "val_set_size": "data.eval_fraction",
    "output_dir": "output",
}
_EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: where, keys and list indices from the top; the place a missing key should have.
        message: what.
    """

    path: KeyPath
    message: str


def problems(errors: Iterable[Mapping[str, Any]], value: Any, model: type[Recipe]) -> list[Problem]:
    """Return one problem for each wrong place; the alternatives of a union are told as one.

    Args:
        errors: `ValidationError.errors()`.
        value: what was validated.
        model: by which model.
    """
    groups: dict[KeyPath, list[tuple[KeyPath, Mapping[str, Any]]]] = {}
    for error in errors:
        path, union = _place(error, value)
        groups.setdefault(path if union is None else union, []).append((path, error))
    return [_problem(place, group, model) for place, group in groups.items()]


def _place(error: Mapping[str, Any], value: Any) -> tuple[KeyPath, KeyPath | None]:
    """Return where an error is, and where the union is whose alternative it is about."""
    path: list[Any] = []
    union: KeyPath | None = None
    parts = error["loc"]
    for index, part in enumerate(parts):
        inside = part in value if isinstance(value, Mapping) else isinstance(value, list) and part in range(len(value))
        if inside:
            path.append(part)
            value = value[part]
        elif error["type"] in ("missing", "invalid_key") and index == len(parts) - 1:
            path.append(part)
        elif union is None:
            union = tuple(path)
    return tuple(path), union


def _problem(place: KeyPath, group: list[tuple[KeyPath, Mapping[str, Any]]], model: type[Recipe]) -> Problem:
    # The alternative that got furthest is the one that was meant: of a list with a wrong item, tell the item.
    deepest = max(len(path) for path, _ in group)
    if deepest > len(place):
        inner = [(path, error) for path, error in group if len(path) == deepest]
        place = inner[0][0]
        group = [(path, error) for path, error in inner if path == place]
    errors = [error for _, error in group]
    kinds = list(dict.fromkeys(_EXPECTED.get(error["type"], "") for error in errors))
    if all(kinds):
        got = errors[0]["input"]
        return Problem(place, f"expected {_either(kinds)}, got {shown(got)}{_advice(kinds, got, _field(place, model))}")
    other = next(error for error in errors if error["type"] not in _EXPECTED)
    return Problem(place, _message(place, other, model))


def _message(place: KeyPath, error: Mapping[str, Any], model: type[Recipe]) -> str:
    kind, context, got = error["type"], error.get("ctx", {}), error["input"]
    if kind == "extra_forbidden":
        return _unknown_key(place, model)
    if kind == "missing":
        return f"missing. {_description(place, model)}".strip()
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {_number(context[name])}, got {shown(got)}"
    if kind == "literal_error":
        expected = str(context.get("expected", ""))
        choices = re.findall(r"'([^']*)'", expected)
        if not choices:  # one number, true or false: a task narrows a key to what it can do
            return f"must be {expected.lower()} for this task, got {shown(got)}"
        near = difflib.get_close_matches(str(got).lower(), choices, n=1, cutoff=0.5)
        return f"{shown(got)} is none of {', '.join(choices)}" + (f"; did you mean {near[0]!r}?" if near else "")
    if kind == "too_long":
        return f"must be empty for this task, got {len(got)}" if not context["max_length"] else error["msg"]
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    if kind == "invalid_key":
        return "a key must be a text"
    text = " ".join(str(error["msg"]).split())
    return f"{text[:1].lower()}{text[1:]}, got {shown(got)}"


def _unknown_key(place: KeyPath, model: type[Recipe]) -> str:
    key, parent = str(place[-1]), place[:-1]
    sections = sections_of(model)
    own = list(sections.get(parent, {}))
    elsewhere = [path for path, keys in sections.items() if path != parent and key in keys]
    if elsewhere:
        return f"unknown key here; {key!r} belongs {_in(elsewhere[0])}"
    if known := _ELSEWHERE.get(key):
        *section, name = known.split(".")
        if name in sections.get(tuple(section), {}):
            same = tuple(section) == parent
            return f"unknown key; it is called {name!r} here" + ("" if same else f" and belongs {_in(tuple(section))}")
    if near := difflib.get_close_matches(key.lower().replace("-", "_"), own, n=1):
        return f"unknown key; did you mean {near[0]!r}?"
    others = {name: path for path, keys in sections.items() for name in keys if path != parent}
    if near := difflib.get_close_matches(key.lower().replace("-", "_"), others, n=1, cutoff=0.75):
        return f"unknown key; did you mean {near[0]!r}, which belongs {_in(others[near[0]])}?"
    return f"unknown key; {'.'.join(parent) or 'a recipe'} has {', '.join(own)}" if own else "unknown key"


def _in(path: KeyPath) -> str:
    return f"under {'.'.join(path)!r}" if path else "at the top, under no section"


def sections_of(model: type[Section]) -> dict[KeyPath, dict[str, Any]]:
    """Return the keys of a recipe's sections and their fields; the recipe's own are at the empty path."""
    own = {field.alias or name: field for name, field in model.model_fields.items()}
    found: dict[KeyPath, dict[str, Any]] = {(): own}
    for name, field in own.items():
        for section in _section_types(field.annotation):
            found |= {(name, *path): keys for path, keys in sections_of(section).items()}
    return found


def _section_types(annotation: Any) -> Sequence[type[Section]]:
    return [
        kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, Section)
    ]


def _field(place: KeyPath, model: type[Recipe]) -> Any:
    return sections_of(model).get(place[:-1], {}).get(place[-1]) if place else None


def _description(place: KeyPath, model: type[Recipe]) -> str:
    """Return the first sentence of what the docs of a key say, or what a section needs."""
    if section := sections_of(model).get(place):
        needed = [name for name, inner in section.items() if inner.is_required()]
        return f"It is a section with at least {', '.join(needed)}" if needed else ""
    field = _field(place, model)
    text = " ".join(((field and field.description) or "").split())
    return text if len(text) < 160 else text.partition(". ")[0]


def _either(kinds: Sequence[str]) -> str:
    return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def _advice(kinds: Sequence[str], got: Any, field: Any) -> str:
    if got is None:
        return "" if field is None or field.is_required() else "; leave the key out for its default"
    if "true or false" in kinds and isinstance(got, str):
        near = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(got.lower())
        return f"; write {near}" if near else ""
    if "a text" not in kinds:
        return ""
    if isinstance(got, Mapping):
        return "; put a text with braces or a colon in quotes"
    return "; in quotes it is a text" if isinstance(got, (bool, int, float)) else ""


def _number(bound: Any) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)


def shown(value: Any) -> str:
    """Return a value as an error shows it: short, printable, None as nothing."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (Mapping, list)):
        return f"a {'mapping' if isinstance(value, Mapping) else 'list'}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dotted(path: KeyPath) -> str:
    """Return a path as a person writes it: data.train[1]."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = str(part)
            name = name if re.fullmatch(r"[\w*+:/-]{1,60}", name) else shown(name)
            text += f".{name}" if text else name
    return text
