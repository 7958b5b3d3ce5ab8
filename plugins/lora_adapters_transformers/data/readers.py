"""Rows out of data files. What is wrong in a file is said in one line, with the number of the line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_adapters.error_text import first_line
from lora_adapters.errors import RequestError
from lora_adapters_transformers.data.columns import table

if TYPE_CHECKING:
    from collections.abc import Iterator

    import datasets

#: Suffix of a file, without .gz -> kind of its contents.
KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "text"}


def kind_of(path: Path) -> str | None:
    """Return the kind of data in a file by its suffix, None if it is none of ours."""
    suffixes = path.suffixes[-2:]
    suffix = suffixes[0] if len(suffixes) == 2 and suffixes[1].lower() == ".gz" else path.suffix
    return KINDS.get(suffix.lower())


def read_file(path: Path) -> datasets.Dataset:
    """Return the rows of a file of one of `KINDS`, in memory; nothing is cached on disk.

    JSON: lines of objects, or a list of them. CSV and TSV: a header, then text; a .csv whose header has semicolons and
    no comma is read with those. Plain text: a row for each line that is not blank, in the column `text`.

    Raises:
        RequestError: the file is broken, no UTF-8, or has no rows.
    """
    kind = kind_of(path)
    if kind == "parquet":
        rows = _parquet(path)
    else:
        rows = _text_file(path, {"json": _json, "csv": _csv, "tsv": _csv, "text": _lines}[str(kind)])
    if not len(rows):
        raise RequestError(f"{path} has no rows")
    return rows


def _text_file(path: Path, read: Any) -> datasets.Dataset:
    place = [0]
    try:
        with _open(path) as file:
            return table(read(path, file, place))
    except UnicodeDecodeError as e:
        raise RequestError(
            f"{path} is no UTF-8 text (byte 0x{e.object[e.start]:02x} after line {place[0]}): save it as UTF-8"
        ) from e
    except UnicodeEncodeError as e:
        raise RequestError(f"{path} holds half of a \\u surrogate pair, which is no character: mend that text") from e
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise RequestError(f"{path} is a broken .gz file: {e}") from e
    except OSError as e:
        raise RequestError(f"{path} can't be read: {e.strerror or e}") from e


@contextmanager
def _open(path: Path) -> Iterator[io.TextIOBase]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as raw:
        yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")  # type: ignore[arg-type]


def _lines(path: Path, file: io.TextIOBase, place: list[int]) -> Iterator[dict[str, Any]]:
    for place[0], line in enumerate(file, 1):
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


def _json(path: Path, file: io.TextIOBase, place: list[int]) -> Iterator[dict[str, Any]]:
    first = ""
    for place[0], line in enumerate(file, 1):
        if not first and line.lstrip().startswith("["):
            yield from _json_list(path, "\n" * (place[0] - 1) + line + file.read())
            return
        first = first or line.strip()
        if line.strip():
            yield _json_line(path, place[0], line)


def _json_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as e:
        hint = ""
        if number == 1 and line.strip() == "{":
            hint = "; each line must be a whole object, or the file a list of objects"
        raise RequestError(f"{path}, line {number} is no JSON: {_why(e)}{hint}") from e
    if not isinstance(row, dict):
        raise RequestError(f"{path}, line {number} is {_a(row)}, not an object with column names: {line.strip()[:60]}")
    return row


def _json_list(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        where = f", line {e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise RequestError(f"{path}{where} is no JSON: {_why(e)}") from e
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RequestError(f"{path}, record {number} is {_a(row)}, not an object with column names")
    return rows


def _why(error: Exception) -> str:
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else "nested too deep"


def _a(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "a truth value", type(None): "null", dict: "an object"}
    return names.get(type(value), "a number")


def _csv(path: Path, file: io.TextIOBase, place: list[int]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    header_line = file.readline()
    delimiter = "\t" if kind_of(path) == "tsv" else ","
    if delimiter == "," and "," not in header_line and ";" in header_line:
        delimiter = ";"
    lines = _chain(header_line, file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        _check_header(path, header)
        for row in reader:
            place[0] = reader.line_num
            if not row:
                continue
            if len(row) != len(header):
                raise RequestError(
                    f"{path}, line {reader.line_num} has {len(row)} fields, the header {len(header)}: "
                    "put fields that hold a delimiter or a line break in double quotes"
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as e:
        raise RequestError(f"{path}, line {reader.line_num} is no CSV: {e}") from e


def _chain(first: str, rest: io.TextIOBase) -> Iterator[str]:
    yield first
    yield from rest


def _check_header(path: Path, header: list[str]) -> None:
    if not any(header):
        raise RequestError(f"{path} has no rows")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise RequestError(f"{path} has two columns named {twice[0]!r}: rename one in its first line")


def _parquet(path: Path) -> datasets.Dataset:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as file:
                source = pa.BufferReader(file.read())
        else:
            source = path
        return datasets.Dataset(pa.parquet.read_table(source))
    except (pa.ArrowInvalid, OSError, EOFError, zlib.error) as e:
        raise RequestError(f"{path} is no readable Parquet file: {first_line(e)}") from e
