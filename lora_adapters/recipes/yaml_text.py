"""Recipes as YAML 1.2: read to plain values with the line of each key, and written so that any YAML reader agrees.

PyYAML reads YAML 1.1, where 2e-4 is a text, `no` is false and a key given twice is silently the last. Here the core
schema of YAML 1.2 holds, and what no recipe needs (tags, anchors, several documents) is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..errors import RequestError

#: Where a value stands: its keys and list indices from the top.
KeyPath = tuple[Any, ...]

_DEPTH = 32
_TAG = "tag:yaml.org,2002:"
_KINDS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}


@dataclass
class Text:
    """A recipe's text, read.

    Attributes:
        value: mappings, lists, texts, numbers, true and false, None.
        lines: path of a key or list item -> its line, counted from 1.
    """

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """Composes nodes by the rules of YAML 1.2. Its constructors are not used."""

    yaml_implicit_resolvers: dict[Any, Any] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Wrong("anchors (&) and aliases (*) are not used in recipes: write the value out", event.start_mark)
        self.depth += 1
        if self.depth > _DEPTH:
            raise _Wrong(f"more than {_DEPTH} levels of nesting", event.start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


for _kind, _pattern in _KINDS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern.pattern})\Z"), None)


class _Wrong(Exception):
    def __init__(self, message: str, mark: Any) -> None:
        super().__init__(message)
        self.line = mark.line + 1


def parse(text: str, source: str) -> Text:
    """Read YAML.

    Args:
        text: one document.
        source: what an error calls it.

    Raises:
        RequestError: it is no YAML, or more than a recipe may hold; one line, with the line's number.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        found = Text(None)
        found.value = None if node is None else _plain(node, (), found.lines)
        return found
    except _Wrong as error:
        raise RequestError(f"{source}, line {error.line}: {error}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}, line {mark.line + 1}" if mark else source
        raise RequestError(f"{place}: {_syntax(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RequestError(f"{source}, line {line}: the character U+{error.character:04X} is not allowed.") from None
    except (ValueError, OverflowError):
        # PyYAML turns an escape such as "\UFFFFFFFF" into a character without looking.
        raise RequestError(f"{source}: an escape in a quoted text stands for no character.") from None
    finally:
        if loader is not None:
            loader.dispose()


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """Say in one line what is wrong, in words of somebody who writes a recipe."""
    problem, context = error.problem or "", error.context or ""
    if "'\\t'" in problem:
        return "a tab: YAML indents with spaces, put some in its place."
    if "mapping values are not allowed" in problem:
        return "a colon where none can be: put a text that holds ': ' in quotes, or check the indentation."
    if "could not find expected ':'" in problem:
        return "a key without a colon (or the line before it is not finished): write 'key: value'."
    if "but found another document" in problem or "expected a single document" in context:
        return "a second document ('---'): a recipe is one."
    if "expected <block end>" in problem:
        return "the indentation does not match that of the lines above it."
    text = f"{context}, {problem}" if context else problem
    return f"no YAML: {' '.join(text.split())[:200]}. Put a text with special characters in quotes."


def _plain(node: Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, MappingNode) and node.tag == _TAG + "map":
        return _mapping(node, path, lines)
    if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
        return [_plain(item, (*path, index), lines) for index, item in enumerate(node.value)]
    if isinstance(node, ScalarNode):
        return _scalar(node)
    raise _Wrong(f"the tag {node.tag.replace(_TAG, '!!')!r:.80} is not used in recipes: leave it out", node.start_mark)


def _mapping(node: MappingNode, path: KeyPath, lines: dict[KeyPath, int]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, ScalarNode):
            raise _Wrong("a key must be a word; put a text that has braces or brackets in quotes", key_node.start_mark)
        # Every key of a recipe is a name, also one that looks like a number.
        key, line = _text(key_node), key_node.start_mark.line + 1
        if key in result:
            raise _Wrong(f"{key!r:.80} is given twice, first in line {lines[(*path, key)]}", key_node.start_mark)
        lines[(*path, key)] = line
        result[key] = _plain(value_node, (*path, key), lines)
    return result


def _text(node: ScalarNode) -> str:
    if any("\ud800" <= character <= "\udfff" for character in node.value):
        raise _Wrong("half a character (a lone surrogate) in a text", node.start_mark)
    return node.value


def _scalar(node: ScalarNode) -> Any:
    kind, value = node.tag.removeprefix(_TAG), node.value
    if kind == "str":
        return _text(node)
    if kind not in _KINDS or not _KINDS[kind].fullmatch(value):
        raise _Wrong(f"the tag {node.tag.replace(_TAG, '!!')!r:.80} does not go with {value!r:.80}", node.start_mark)
    if kind == "null":
        return None
    if kind == "bool":
        return value.lower() == "true"
    if kind == "float":
        return float(re.sub(r"\.(inf|nan)", r"\1", value.lower()))
    # No number of a recipe needs more, and Python prints no number of more than 4300 digits.
    if len(value) > 24:
        raise _Wrong(f"the number {value:.20}... is too large", node.start_mark)
    return int(value, {"0o": 8, "0x": 16}.get(value[:2], 10))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, _pattern in _KINDS.items():
    _Dumper.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern.pattern})\Z"), None)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    # A text of several lines stays on one, with \n: blocks lose or gain line ends when edited.
    style = '"' if any(not c.isprintable() for c in text) else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def emit(value: Any) -> str:
    """Write plain values as YAML, in their order; `parse` gives them back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31, default_flow_style=False)


def replace(text: str, path: KeyPath, value: Any) -> str:
    """Return a document with the value at `path` replaced by a text, number, true, false or None, all else untouched.

    Raises:
        KeyError: there is no such path.
    """
    loader = _Loader(text)
    try:
        node: Any = loader.get_single_node()
    finally:
        loader.dispose()
    for key in path:
        inner = {name.value: child for name, child in node.value} if isinstance(node, MappingNode) else {}
        node = inner[key]
    new = emit({"a": value})[len("a: ") :].rstrip("\n")
    if isinstance(value, str) and new[0] not in "'\"" and re.search(r"[,\[\]{}]", new):
        new = json.dumps(value, ensure_ascii=False)  # a plain text in a flow mapping would end at a comma or bracket
    return text[: node.start_mark.index] + new + text[node.end_mark.index :]
