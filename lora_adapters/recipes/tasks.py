"""Which tasks there are, which plugin brings each, and the recipe of a task."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from ..errors import PluginError, RequestError

if TYPE_CHECKING:
    from ..hooks.specs import TrainerSpec
    from .sections import Recipe

#: Task -> the plugin that brings it, also where the plugin is not there: an unknown task is then explained.
PLUGIN_OF_TASK = {
    "causal-lm": "transformers",
    "seq2seq": "transformers",
    "text-classification": "transformers",
    "reward": "transformers",
    "rl": "transformers",
    "image-classification": "timm",
    "dreambooth": "diffusers",
}


def trainer_of(task: str) -> TrainerSpec:
    """Return what runs a task.

    Raises:
        RequestError: no plugin that is ready brings it; the message names the plugin that would, or the nearest task.
    """
    from ..hooks.manager import plugins

    trainers = plugins().trainers()
    if task in trainers:
        return trainers[task]
    known = sorted({*trainers, *PLUGIN_OF_TASK})
    if task in PLUGIN_OF_TASK:
        raise RequestError(f"task {task!r} {_why_missing(PLUGIN_OF_TASK[task])}. Ready: {_listed(sorted(trainers))}.")
    near = difflib.get_close_matches(task.lower().replace("_", "-"), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise RequestError(f"no task is called {task[:60]!r}{hint} There are: {_listed(known)}.")


def recipe_class(spec: TrainerSpec) -> type[Recipe]:
    """Return the pydantic model of a task's recipe.

    Raises:
        PluginError: the plugin's `config` can't be imported or is no Recipe.
    """
    from ..hooks.manager import load_object
    from .sections import Recipe

    try:
        found = load_object(spec.config)
    except Exception as error:
        raise PluginError(f"The recipe of task {spec.task!r} ({spec.config}) can't be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Recipe)):
        raise PluginError(
            f"The recipe of task {spec.task!r} ({spec.config}) is no lora_adapters.recipes.sections.Recipe."
        )
    return found


def _why_missing(plugin: str) -> str:
    from ..hooks.manager import plugins

    status = next((status for status in plugins().status() if status.name == plugin), None)
    if status is None:
        return f"comes with the plugin {plugin!r}, which is not part of this version"
    if status.state == "blocked":
        return f"comes with the plugin {plugin!r}, which is blocked ({status.detail})"
    if status.state == "broken":
        return f"comes with the plugin {plugin!r}, which is broken: {' '.join(status.detail.split())}"
    return f"comes with the plugin {plugin!r}, but {status.origin} has no such task yet: a newer version may"


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
