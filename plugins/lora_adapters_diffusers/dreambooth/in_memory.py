"""DreamBooth on a pipeline in memory: the same recipe and runner as `lora-adapters train`, from keyword arguments."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lora_adapters.error_text import did_you_mean
from lora_adapters.errors import RequestError
from lora_adapters.recipes.messages import sections_of
from lora_adapters.recipes.reading import validate
from lora_adapters.report.facts import RunFacts
from lora_adapters.runs.progress import Progress
from lora_adapters.runs.run import train

from ..recipes import DreamBoothRecipe
from .runner import DreamBoothRunner
from .session import check_in_memory

if TYPE_CHECKING:
    from lora_adapters.adapter import Adapter

    from ..pipeline import LoraPipeline

#: Sections that a key is looked for in before all others, where several have it.
_FIRST = ("adapter", "data", "diffusion", "training")
#: What says where the base is and how it is stored, which a pipeline in memory has decided.
_OF_LOADING = "model"


@dataclass(frozen=True)
class DreamBoothResult:
    """What came of a training.

    Attributes:
        facts: all that is known of it: losses before and after, images, speed, memory.
        adapters: component -> handle of the adapter that the pipeline now carries.
        folder: of the run, with adapter/, report.html and checkpoints; None if none was to be kept.
    """

    facts: RunFacts
    adapters: dict[str, Adapter]
    folder: Path | None


def dreambooth(
    lora: LoraPipeline,
    images: Any,
    prompt: str | None,
    class_prompt: str | None,
    steps: int | None,
    output: str | Path | None,
    adapter_name: str,
    quiet: bool,
    options: Mapping[str, Any],
) -> DreamBoothResult:
    """Train; see `LoraPipeline.dreambooth`."""
    check_in_memory(lora.pipe)
    if adapter_name in {name for names in lora.adapters.values() for name in names}:
        raise RequestError(f"There is an adapter {adapter_name!r} already: give another adapter_name, or delete it.")
    given, pictures = _images(images)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if output is None else str(output)
        recipe = recipe_from(options, {"images": given, "prompt": prompt}, class_prompt, steps)
        recipe["model"] = {"name": _name_of(lora.pipe), "device": str(lora.pipe.device)}
        recipe["output"] = str(Path(folder, "run")) if output is None else folder
        checked: Any = validate(recipe, "dreambooth")
        runner = DreamBoothRunner(checked, lora, pictures, adapter_name)
        facts = train(checked, runner, Progress(quiet=quiet))
    handles = {name: lora.adapter(name, adapter_name) for name in lora.adapters if adapter_name in lora.adapters[name]}
    return DreamBoothResult(facts, handles, None if output is None else Path(folder))


def recipe_from(
    options: Mapping[str, Any], data: Mapping[str, Any], class_prompt: str | None, steps: int | None
) -> dict[str, Any]:
    """Return the recipe as a mapping, without model and output.

    Args:
        options: sections (training={"ema": 0.99}) and single keys (learning_rate=1e-4).
        data: keys of the section data.
        class_prompt: of prior preservation.
        steps: of the training.

    Raises:
        RequestError: a key that there is not, or that several sections have.
    """
    sections = {path[0]: keys for path, keys in sections_of(DreamBoothRecipe).items() if path}
    plain = [name for name in sections_of(DreamBoothRecipe)[()] if name not in sections]
    recipe: dict[str, Any] = {"schema": 1, "task": "dreambooth"}
    for name, value in options.items():
        if name == _OF_LOADING or name in ("task", "schema", "output"):
            raise RequestError(f"{name!r} is for recipes: the pipeline is in memory. Leave it out.")
        if name in sections:
            recipe[name] = {**recipe.get(name, {}), **_section(name, value)}
        elif name in plain:
            recipe[name] = value
        else:
            section = _section_with(name, sections)
            recipe[section] = {**recipe.get(section, {}), name: value}
    known = {key: value for key, value in data.items() if value is not None}
    recipe["data"] = {**recipe.get("data", {}), **known}
    if class_prompt is not None:
        recipe["prior"] = {**recipe.get("prior", {}), "prompt": class_prompt}
    if steps is not None:
        recipe["training"] = {**recipe.get("training", {}), "max_steps": steps}
    return recipe


def _section(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} is a section: give a mapping of its keys, such as {name}={{...}}.")
    return value


def _section_with(key: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    having = [name for name, keys in sections.items() if key in keys and name != _OF_LOADING]
    found = [name for name in _FIRST if name in having] or having
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(f"{key!r} is a key of {' and of '.join(found)}: say which, as {found[0]}={{{key!r}: ...}}.")
    names = [*sections, *(name for keys in sections.values() for name in keys)]
    raise RequestError(f"dreambooth has no option {key!r}.{did_you_mean(key, names)}")


def _images(images: Any) -> tuple[str | list[str], list[Image.Image] | None]:
    """Return what the recipe calls the images, and those that are in memory."""
    if isinstance(images, (str, os.PathLike)):
        return os.fspath(images), None
    if not isinstance(images, Sequence) or not images:
        raise RequestError("images: give a folder, a list of files, or a list of PIL images.")
    if any(isinstance(image, Image.Image) for image in images):
        return "images in memory", list(images)
    return [os.fspath(image) for image in images], None


def _name_of(pipe: Any) -> str:
    return str(pipe.config.get("_name_or_path") or type(pipe).__name__)
