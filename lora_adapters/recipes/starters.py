"""Recipes to start from: every plugin brings some for its tasks, and `new` fills in what the user already knows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..error_text import did_you_mean
from ..errors import PluginError, PluginWarning, RequestError
from .yaml_text import parse, replace


@dataclass(frozen=True)
class Starter:
    """A recipe to start from.

    Attributes:
        name: what `lora-adapters new` calls it.
        task: which task it is for.
        summary: its first comment line.
        text: all of it, comments included.
    """

    name: str
    task: str
    summary: str
    text: str


def starters() -> dict[str, Starter]:
    """Return the starter recipes of every plugin, by name; a folder that can't be read is reported and left out."""
    from ..hooks.manager import plugins

    folders = dict.fromkeys(spec.examples for spec in plugins().trainers().values() if spec.examples)
    found: dict[str, Starter] = {}
    for folder in folders:
        try:
            brought = _read(folder)
        except Exception as error:
            warnings.warn(f"The recipes in {folder} are left out: {error}", PluginWarning, stacklevel=2)
            continue
        found = {**brought, **found}
    return dict(sorted(found.items()))


def starter(name: str) -> Starter:
    """Return one of them.

    Raises:
        RequestError: no recipe is called that; the message names the nearest.
    """
    known = starters()
    if name in known:
        return known[name]
    hint = did_you_mean(name, known, cutoff=0.5)
    raise RequestError(f"No recipe is called {name[:60]!r}.{hint} There are: {', '.join(known) or 'none'}.")


def data_key(task: str) -> tuple[str, str]:
    """Return the path of the key of a task's recipe that says what to train on: the first that its `data` needs."""
    from .messages import sections_of
    from .tasks import recipe_class, trainer_of

    keys = sections_of(recipe_class(trainer_of(task))).get(("data",), {})
    return "data", next((name for name, field in keys.items() if field.is_required()), "train")


def filled(text: str, given: Mapping[tuple[str, ...], str]) -> str:
    """Return a recipe's text with other values; comments and all else stay as they are.

    Args:
        text: the recipe.
        given: path of a key that the recipe has -> its new value.
    """
    for path, value in given.items():
        text = replace(text, path, value)
    return text


def _read(folder: str) -> dict[str, Starter]:
    package, _, inside = folder.partition(":")
    found = {}
    for entry in resources.files(package).joinpath(inside).iterdir():
        name, dot, suffix = entry.name.rpartition(".")
        if not dot or suffix != "yaml":
            continue
        text = entry.read_text(encoding="utf-8")
        value: Any = parse(text, entry.name).value
        if not isinstance(value, dict) or not isinstance(value.get("task"), str):
            raise PluginError(f"{entry.name} names no task")
        comments = [line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#")]
        found[name] = Starter(name, value["task"], comments[0] if comments else "", text)
    return found
