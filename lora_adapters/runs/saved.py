"""Saved adapters on the command line: which folder holds one, what to call it, and the recipe it was trained by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .folder import ADAPTER, RECIPE

if TYPE_CHECKING:
    from ..recipes.sections import Recipe


def named(paths: Sequence[str]) -> dict[str, Path]:
    """Return a short name for each adapter -> its folder; a run's folder means the adapter in it.

    Raises:
        RequestError: nothing is there, or it holds no adapter.
        CheckpointError: an adapter on the Hub can't be had.
    """
    from ..checkpoint import resolve_adapter_path

    found: dict[str, Path] = {}
    for path in paths:
        folder = Path(path)
        if folder.is_dir() and (folder / ADAPTER).is_dir():
            folder = folder / ADAPTER
        elif folder.is_dir() and (folder / RECIPE).is_file():
            raise RequestError(f"The run in {path} has no adapter: it ended before it saved one.")
        resolved = resolve_adapter_path(str(folder) if folder.exists() else path, None)
        name = folder.parent.name if folder.name == ADAPTER else folder.name
        unique = name if name not in found and name != "base" else path
        found[unique] = Path(resolved)
    return found


def recipe_for(adapters: Mapping[str, Path], changes: Mapping[str, Any], overrides: Sequence[str]) -> Recipe:
    """Return the recipe to load and measure adapters by: that of the first one's run, else one made from its config.

    Args:
        adapters: as `named` returns them.
        changes: section -> key -> value, set before the overrides.
        overrides: "data.text=body", as for `train`.

    Raises:
        RequestError: the adapter comes without a recipe and its config does not say enough, or the recipe is wrong.
    """
    from ..recipes.reading import read_recipe, validate

    first = next(iter(adapters.values()))
    path = first.parent / RECIPE
    trained_here = first.name == ADAPTER and path.is_file()
    mapping = read_recipe(path).model_dump(by_alias=True) if trained_here else _from_config(first)
    mapping |= {"resume": False, "overwrite": False}
    for section, values in changes.items():
        if isinstance(values, Mapping):
            mapping[section] = {**(mapping.get(section) or {}), **values}
        else:
            mapping[section] = values
    return validate(mapping, str(path if trained_here else first), overrides)


def _from_config(folder: Path) -> dict[str, Any]:
    from ..checkpoint import inspect_adapter
    from ..inspection import TASK_OF_TYPE

    config = inspect_adapter(folder).config
    task, base = TASK_OF_TYPE.get(config.get("task_type") or ""), config.get("base_model_name_or_path")
    mapping: dict[str, Any] = {"schema": 1, "model": {}, "data": {"train": ""}, "output": str(folder)}
    if task:
        mapping["task"] = task
    if base:
        mapping["model"]["name"] = base
    return mapping
