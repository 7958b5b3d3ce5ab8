"""Writes the tables of keys in docs/recipes.md from the recipes' models: python tests/recipe_reference.py."""

import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from lora_adapters.hooks.manager import plugins
from lora_adapters.recipes.messages import sections_of
from lora_adapters.recipes.sections import Section
from lora_adapters.recipes.tasks import PLUGIN_OF_TASK, recipe_class
from lora_adapters.recipes.yaml_text import emit

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
MARK = "<!-- From here on written by `python tests/recipe_reference.py`; don't edit. -->\n"
_WORDS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true, false",
    type(None): "nothing",
    Any: "anything",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
#: Section -> rows of its table.
Rows = dict[tuple[str, ...], list[str]]
_HEADER = ("| key | default | value | |", "|---|---|---|---|")


def page() -> str:
    """Return the page as it should be: the text above the mark as it is, the tables below."""
    return PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK + tables()


def tables() -> str:
    """Return the tables: first the keys that all tasks share, then those of a plugin's, then each task's own."""
    trainers = plugins().trainers()
    # Not those of other plugins that happen to be installed.
    rows = {task: _rows(recipe_class(trainers[task])) for task in sorted(PLUGIN_OF_TASK) if task in trainers}
    lines, told = ["", "## Keys of every recipe", ""], _common(rows.values())
    lines += _sections(told, {})
    for plugin in sorted(set(PLUGIN_OF_TASK.values())):
        tasks = [task for task in rows if PLUGIN_OF_TASK[task] == plugin]
        known = told
        if len(tasks) > 1:
            known = _common([rows[task] for task in tasks])
            lines += [f"## Keys of {', '.join(tasks[:-1])} and {tasks[-1]}", "", *_sections(known, told)]
        for task in tasks:
            lines += [f"## {task}", "", trainers[task].summary, "", *_sections(rows[task], known)]
    return "\n".join(lines)


def _common(recipes: Iterable[Rows]) -> Rows:
    """Return the rows that all of these recipes have."""
    first, *others = recipes
    return {
        section: [row for row in own if all(row in other.get(section, []) for other in others)]
        for section, own in first.items()
    }


def _sections(rows: Rows, told: Rows) -> list[str]:
    """Return the tables of the rows that were not told before."""
    lines: list[str] = []
    for section, own in rows.items():
        if new := [row for row in own if row not in told.get(section, [])]:
            lines += [*_title(section), *_HEADER, *new, ""]
    return lines


def _title(section: tuple[str, ...]) -> list[str]:
    return [f"### {'.'.join(section)}", ""] if section else []


def _rows(model: type[Section]) -> dict[tuple[str, ...], list[str]]:
    sections = sections_of(model)
    return {
        path: [
            f"| `{name}` | {_default(field)} | {_values(field.annotation, field.metadata)} | {_description(field)} |"
            for name, field in fields.items()
            if (*path, name) not in sections
        ]
        for path, fields in sections.items()
    }


def _default(field: Any) -> str:
    if field.is_required():
        return "needed"
    return "" if field.default is None else _as_yaml(field.default)


def _as_yaml(value: Any) -> str:
    if isinstance(value, list) and value:
        return f"`[{', '.join(emit([one])[2:].strip() for one in value)}]`"
    return f"`{emit([value])[2:].strip()}`"


def _description(field: Any) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def _values(annotation: Any, metadata: Sequence[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0], [part for extra in arguments[1:] for part in extra.metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_values(one, metadata) for one in arguments if one is not type(None))
    if origin is Literal:
        return ", ".join(_as_yaml(one) for one in arguments)
    if origin is list:
        return f"list of {_several(arguments[0])}"
    if origin is dict:
        return f"mapping to {_several(arguments[1])}"
    limits = [
        f"{word} {int(limit) if limit == int(limit) else limit}"
        for part in metadata
        for name, word in _BOUNDS.items()
        if (limit := getattr(part, name, None)) is not None
    ]
    return ", ".join([_WORDS[annotation], *limits])


def _several(annotation: Any) -> str:
    words = _values(annotation, ())
    if " or " in words or ", at " in words or ", above" in words:
        return f"({words})"
    return f"{words}s" if annotation in _WORDS else words


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
