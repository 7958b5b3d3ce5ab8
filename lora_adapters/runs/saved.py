"""Saved adapters on the command line: which folder holds one, what to call it, and the recipe it was trained by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .folder import ADAPTER, CHECKPOINTS, RECIPE

if TYPE_CHECKING:
    from ..recipes.sections import Recipe


def named(paths: Sequence[str]) -> dict[str, Path]:
    """Return a short name for each adapter -> its folder; a run's folder means the adapter in it.

    Raises:
        RequestError: a run has no adapter.
        CheckpointError: nothing is there, it holds no adapter that can be read, or the Hub has none.
    """
    from ..checkpoint import resolve_adapter_path

    found: dict[str, Path] = {}
    for path in paths:
        folder = Path(path)
        if folder.is_dir() and (folder / ADAPTER).is_dir():
            folder = folder / ADAPTER
        elif folder.is_dir() and (folder / RECIPE).is_file():
            raise RequestError(f"The run in {path} has no adapter: it ended before it saved one.")
        resolved = resolve_adapter_path(folder if folder.exists() else path)
        config_of(resolved)
        absolute = folder.resolve()
        on_the_hub = not folder.is_dir()
        name = path if on_the_hub else absolute.parent.name if absolute.name == ADAPTER else absolute.name
        unique = name if name not in found and name != "base" else path
        while unique in found:
            unique += "'"
        found[unique] = resolved
    return found


def config_of(folder: Path) -> Any:
    """Return the config of an adapter after looking at its header; of an image model's file in diffusers' format, {}.

    Raises:
        CheckpointError: it is damaged, or there is none.
    """
    from ..adapter_config import DIFFUSERS_NAME
    from ..checkpoint import inspect_adapter
    from ..formats.source import open_source

    if (folder / DIFFUSERS_NAME).is_file():
        open_source(folder / DIFFUSERS_NAME)
        return {}
    return inspect_adapter(folder).config.values


def each_model(model: Any, adapters: Mapping[str, Path]) -> Iterator[tuple[str, Any]]:
    """Yield ("base", model), then for each adapter its name and the model that carries it.

    Args:
        model: the base.
        adapters: as `named` returns them.
    """
    from ..api import restore

    yield "base", model
    for name, path in adapters.items():
        adapter = restore(model, path)
        yield name, adapter.model
        adapter.detach()


def recipe_for(adapters: Mapping[str, Path], changes: Mapping[str, Any], overrides: Sequence[str]) -> Recipe:
    """Return the recipe to load and measure adapters by: that of the first one's run, else one made from its config.

    Args:
        adapters: as `named` returns them.
        changes: section -> key -> value, set before the overrides; keys that the task does not have are left out.
        overrides: "data.text=body", as for `train`.

    Raises:
        RequestError: the adapter comes without a recipe and its config does not say enough, or the recipe is wrong.
    """
    from ..recipes.reading import read_recipe, validate

    first = next(iter(adapters.values()))
    path = _recipe_of(first)
    mapping = read_recipe(path).model_dump(by_alias=True) if path is not None else _from_config(first)
    mapping |= {"resume": False, "overwrite": False}
    for section, values in changes.items():
        if isinstance(values, Mapping):
            known = _keys(mapping, overrides, section)
            mapping[section] = {
                **(mapping.get(section) or {}),
                **{key: value for key, value in values.items() if known is None or key in known},
            }
        else:
            mapping[section] = values
    recipe = validate(mapping, str(path or first), overrides)
    if not any(override.partition("=")[0].strip() == "model.name" for override in overrides):
        _check_same_base(adapters, recipe.model.name)
    return recipe


def _keys(mapping: Mapping[str, Any], overrides: Sequence[str], section: str) -> set[str] | None:
    """Return the keys of a section of the task's recipe, None if the task is not known."""
    from ..recipes.messages import sections_of
    from ..recipes.tasks import recipe_class, trainer_of

    tasks = [o.partition("=")[2].strip() for o in overrides if o.partition("=")[0].strip() == "task"]
    task = tasks[-1] if tasks else mapping.get("task")
    try:
        return set(sections_of(recipe_class(trainer_of(str(task)))).get((section,), ()))
    except RequestError:
        return None


def _recipe_of(adapter: Path) -> Path | None:
    """Return the recipe of the run that an adapter, or a checkpoint of it, belongs to; None if no run wrote it."""
    adapter = adapter.resolve()
    run = adapter.parent if adapter.name == ADAPTER else adapter.parent.parent
    ours = adapter.name == ADAPTER or adapter.parent.name == CHECKPOINTS
    return run / RECIPE if ours and (run / RECIPE).is_file() else None


def _check_same_base(adapters: Mapping[str, Path], base: str) -> None:
    """Raise if an adapter says that it was trained on another model than `base`. Who gives model.name knows better."""
    for name, folder in adapters.items():
        own = config_of(folder).get("base_model_name_or_path")
        if own and own != base and Path(own).resolve() != Path(base).resolve():
            raise RequestError(
                f"{name} was trained on {own}, and {next(iter(adapters))} on {base}: adapters on different bases can't be "
                "compared in one command. If both are the same model, say where it lies: model.name=..."
            )


def _from_config(folder: Path) -> dict[str, Any]:
    from ..inspection import TASK_OF_TYPE

    config = config_of(folder)
    # No training data is needed, and the adapter's folder is never written to.
    task, base = TASK_OF_TYPE.get(config.get("task_type") or ""), config.get("base_model_name_or_path")
    mapping: dict[str, Any] = {"schema": 1, "model": {}, "data": {"train": ""}, "output": str(folder)}
    if task:
        mapping["task"] = task
    if base:
        mapping["model"]["name"] = base
    return mapping
