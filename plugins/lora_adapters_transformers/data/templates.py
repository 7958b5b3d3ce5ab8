"""Texts from rows: a column, or a template such as "{question}\\n{answer}"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from lora_adapters.errors import RequestError
from lora_adapters_transformers.data.columns import text_of

_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Template:
    """A column's name, or text with {column} in it; {{ and }} stand for braces. No format specs, no indexing.

    Args:
        text: the column or template.
        columns: the columns there are.
        key: where the recipe has it, such as "data.text", for messages.

    Attributes:
        fields: the columns it needs.

    Raises:
        RequestError: it names no column or an unknown one (with the nearest), or a brace has no partner.
    """

    def __init__(self, text: str, columns: Iterable[str], key: str = "template") -> None:
        self.text, self.key = text, key
        columns = list(columns)
        self._parts: list[tuple[str, bool]] = [(text, True)]
        if text not in columns and ("{" in text or "}" in text):
            self._parts = _parse(text, key)
        self.fields = [part for part, is_column in self._parts if is_column]
        for name in self.fields:
            if name not in columns:
                raise RequestError(unknown_column(name, columns, key))
        if not self.fields:
            raise RequestError(
                f"{key}: {text!r} names no column, so that every row would be the same: put one in braces"
            )

    def fill(self, row: Mapping[str, Any]) -> str | None:
        """Return the row's text, None if a column it needs is empty in this row (no value, or blank).

        Raises:
            RequestError: a value is no text or number.
        """
        filled = []
        for part, is_column in self._parts:
            if is_column:
                value = row[part]
                if value is None or (isinstance(value, str) and not value.strip()):
                    return None
                if isinstance(value, (list, dict, bytes)):
                    kind = {list: "a list", dict: "a mapping", bytes: "bytes"}[type(value)]
                    raise RequestError(f"{self.key}: column {part!r} holds {kind}, where text or a number is needed")
                part = text_of(value)
            filled.append(part)
        return "".join(filled)


def _parse(text: str, key: str) -> list[tuple[str, bool]]:
    parts, end = [], 0
    for found in _PARTS.finditer(text):
        parts.append((text[end : found.start()], False))
        end = found.end()
        if found.group() in ("{{", "}}"):
            parts.append((found.group()[0], False))
        elif found.group(1) is not None:
            parts.append((found.group(1), True))
        else:
            raise RequestError(
                f"{key}: {found.group()!r} at character {found.start() + 1} of {text!r} has no partner; "
                "write {column}, or {{ and }} for braces"
            )
    return [part for part in [*parts, (text[end:], False)] if part[0] or part[1]]


def unknown_column(name: str, columns: Iterable[str], key: str) -> str:
    """Return the message for a column that is not there: the nearest, and those there are."""
    columns = sorted(columns)
    lower = {column.lower(): column for column in columns}
    near = get_close_matches(name.lower(), list(lower), n=1, cutoff=0.5)
    hint = f"; did you mean {lower[near[0]]!r}?" if near else "."
    if not near and re.search(r"[\[\]:!.]", name):
        hint = "; only plain column names can stand in braces, no formats or indices."
    shown = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    return f"{key}: no column {name!r}{hint} Columns: {shown}"
