"""From a recipe file and `key=value` overrides to a checked recipe, and back. Nothing is loaded, no torch imported."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import MissingDependencyError, RequestError
from .messages import Problem, dotted, problems, shown
from .sections import SCHEMA, Recipe
from .tasks import recipe_class, trainer_of
from .yaml_text import KeyPath, emit, parse

_MAX_BYTES = 2**20
_COMMAND_LINE = "on the command line"


@dataclass
class _Places:
    """Where each value came from.

    Attributes:
        source: what to call the file, or the mapping.
        lines: path -> line in the file, None for what the command line gave.
    """

    source: str
    lines: dict[KeyPath, int | None] = field(default_factory=dict)

    def of(self, path: KeyPath) -> tuple[int, str]:
        """Return a line to sort by, and the words for the place of a path or of the nearest section around it."""
        while path and path not in self.lines:
            path = path[:-1]
        line = self.lines.get(path) if path else 0
        if line is None:
            return 2**31, _COMMAND_LINE
        return line, f"{self.source}, line {line}" if line else self.source


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and check it against its task.

    Args:
        path: a YAML file of up to 1 MiB.
        overrides: "training.epochs=3", "data.train=[a.jsonl, b.jsonl]": the value is read as YAML, the last one counts.

    Raises:
        RequestError: the file can't be read, or anything in it is wrong. One line for each thing, with its place and, where
            there is one, the nearest right name.
        MissingDependencyError: the task needs a package that is not installed.
    """
    text = parse(_contents(Path(path)), str(path))
    value = {} if text.value is None else text.value
    places = _Places(str(path), {place: line for place, line in text.lines.items() if place})
    if not isinstance(value, dict):
        raise RequestError(
            f"{path}: a recipe is a mapping of keys, this is {shown(value)}: begin with 'task: causal-lm'."
        )
    for override in overrides:
        _override(value, places, override)
    return _validated(value, places)


def validate(mapping: Mapping[str, Any], source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe that is a mapping already; as `read_recipe`, without lines.

    Args:
        mapping: what a recipe file would hold.
        source: what errors call it.
        overrides: as for `read_recipe`.
    """
    if not isinstance(mapping, Mapping):
        raise RequestError(f"{source}: a recipe is a mapping of keys, this is {shown(mapping)}.")
    value, places = copy.deepcopy(dict(mapping)), _Places(source)
    for override in overrides:
        _override(value, places, override)
    return _validated(value, places)


def dump(recipe: Recipe) -> str:
    """Return a recipe as YAML, every default written out. Reading it gives an equal recipe."""
    return emit(recipe.model_dump(by_alias=True))


# ---- the file --------------------------------------------------------------------------------------------------------


def _contents(path: Path) -> str:
    if path.is_dir():
        raise RequestError(f"{path} is a folder: give the recipe file in it.")
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file. {_nearest_file(path)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RequestError(f"{str(path)!r} can't be read: {reason}.") from None
    if len(data) > _MAX_BYTES:
        raise RequestError(f"{path} is larger than 1 MiB: that is no recipe. Give the YAML file, not the data.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path}, line {line}: not UTF-8. Save the file as UTF-8 text.") from None


def _nearest_file(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"Did you mean {path.with_name(near[0])}?"
    return "'lora-adapters new' writes a recipe to start from."


def _printable(key: str) -> str:
    return key if key.isprintable() else repr(key)


def _override(value: dict[str, Any], places: _Places, override: str) -> None:
    """Put one "a.b=value" into a recipe."""
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise RequestError(f"{override[:80]!r} is no key=value, such as training.epochs=3.")
    new = parse(text, f"{_COMMAND_LINE}: {_printable(key.strip())}").value
    inner = value
    for depth, name in enumerate(keys[:-1], 1):
        if inner.get(name) is None:
            inner[name] = {}
        inner = inner[name]
        if not isinstance(inner, dict):
            above = _printable(".".join(keys[:depth]))
            raise RequestError(
                f"{_COMMAND_LINE}: {_printable(key.strip())}: {above} is {shown(inner)}, it has no keys."
            )
    inner[keys[-1]] = new
    path = tuple(keys)
    for place in [place for place in places.lines if place[: len(path)] == path]:
        del places.lines[place]
    for depth in range(1, len(path)):
        places.lines.setdefault(path[:depth], None)
    places.lines[path] = None


# ---- checking --------------------------------------------------------------------------------------------------------


def _validated(value: dict[str, Any], places: _Places) -> Recipe:
    _check_schema(value, places)
    spec = _trainer(value, places)
    model = recipe_class(spec)
    try:
        from ..hooks.manager import require

        require(spec.requires, spec.extra, f"Task {spec.task!r}")
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{places.of(('task',))[1]}: {error}") from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _error(problems(error.errors(include_url=False), value, model), places) from None
    except RecursionError:
        raise RequestError(f"{places.source}: nested too deeply.") from None


def _check_schema(value: Mapping[str, Any], places: _Places) -> None:
    schema = value.get("schema", SCHEMA)
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        message = (
            f"a recipe of schema {schema}; this version of lora-adapters reads {SCHEMA}: pip install -U lora-adapters"
        )
        raise _error([Problem(("schema",), message)], places)
    if type(schema) is not int or schema != SCHEMA:
        raise _error([Problem(("schema",), f"must be {SCHEMA}, got {shown(schema)}")], places)


def _trainer(value: Mapping[str, Any], places: _Places) -> Any:
    task = value.get("task")
    if not isinstance(task, str):
        from ..hooks.manager import plugins

        what = f"expected a text, got {shown(task)}" if "task" in value else "missing"
        raise _error([Problem(("task",), f"{what}. Tasks are {', '.join(plugins().trainers())}")], places)
    try:
        return trainer_of(task)
    except RequestError as error:
        raise RequestError(f"{places.of(('task',))[1]}: {error}") from None


def _error(found: Sequence[Problem], places: _Places) -> RequestError:
    placed = sorted(((*places.of(problem.path), problem) for problem in found), key=lambda item: item[0])
    lines = []
    for _, place, problem in placed:
        at = f"{place}: {dotted(problem.path)}" if problem.path else place
        lines.append(f"{at}: {problem.message}{'' if problem.message.endswith(('.', '?')) else '.'}")
    return RequestError("\n".join(lines))
