"""Columns of an Arrow table from Python values whose types nobody promised. Nothing is guessed from the text of a value."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import datasets
    import pyarrow as pa

_CHUNK = 10_000


def table(rows: Iterable[dict[str, Any]]) -> datasets.Dataset:
    """Return the rows as a Dataset in memory, with a column for every key of any row.

    A column of one kind (text, int, float or bool) keeps it. Mixed ones become text, as a template would write them.
    Lists and mappings are kept as JSON (`datasets.Json`): Arrow's structs would give each the keys of all others.

    Raises:
        UnicodeEncodeError: a text holds half a surrogate pair, which UTF-8 has no form for.
    """
    import datasets
    import pyarrow as pa

    chunks: list[dict[str, tuple[str, list[Any]]]] = []
    kinds: dict[str, str] = {}
    for chunk in _chunks(rows):
        names = {name: None for row in chunk for name in row}
        columns = {name: [row.get(name) for row in chunk] for name in names}
        for name, values in columns.items():
            kinds[name] = _common(kinds.get(name, "null"), _kind(values))
        chunks.append({name: (kinds[name], _held(values, kinds[name])) for name, values in columns.items()})
    fields = [pa.field(name, _type(kind)) for name, kind in kinds.items()]
    batches = [_batch(chunk, kinds, fields) for chunk in chunks]
    return datasets.Dataset(pa.Table.from_batches(batches, schema=pa.schema(fields)))


def text_of(value: Any) -> str:
    """Return a number, truth value or text as text: true and false as JSON and CSV files have them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else str(value)


def _chunks(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _kind(values: list[Any]) -> str:
    kind = "null"
    for found in {type(value) for value in values}:
        kind = _common(
            kind, {type(None): "null", bool: "bool", int: "int", float: "float", str: "text"}.get(found, "json")
        )
    return "text" if kind == "int" and any(v is not None and abs(v) >= 2**63 for v in values) else kind


def _common(one: str, other: str) -> str:
    if "null" in (one, other) or one == other:
        return other if one == "null" else one
    return "json" if "json" in (one, other) else "text"


def _held(values: list[Any], kind: str) -> list[Any]:
    """Let go of nested objects early: as JSON they take a fraction of the memory."""
    return [None if value is None else json.dumps(value) for value in values] if kind == "json" else values


def _type(kind: str) -> pa.DataType:
    import pyarrow as pa

    types = {"null": pa.null(), "bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string()}
    return types[kind] if kind in types else pa.json_()


def _batch(chunk: dict[str, tuple[str, list[Any]]], kinds: dict[str, str], fields: list[pa.Field]) -> pa.RecordBatch:
    import pyarrow as pa

    rows = len(next(iter(chunk.values()), ("", []))[1])
    arrays = []
    for field in fields:
        held, values = chunk.get(field.name, ("null", [None] * rows))
        if kinds[field.name] == "text":
            values = [None if value is None else text_of(value) for value in values]
        elif held != "json":
            values = _held(values, kinds[field.name])
        arrays.append(pa.array(values, type=field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))
