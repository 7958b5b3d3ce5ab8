"""What every encoding gives back, and the counting of rows that are too long or left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lora_adapters.errors import RequestError
from lora_adapters.report.facts import DataFacts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import datasets
    import pyarrow as pa

    from lora_adapters_transformers.recipes import TextData

BATCH = 1000
IGNORED = -100


@dataclass
class Encoded:
    """Rows of token ids and what is known of them.

    Attributes:
        rows: in memory, in the order of the data. Its columns are those the task's encoding names.
        facts: numbers for the report.
        label_names: of a classification, in the order of the label ids; else empty.
    """

    rows: datasets.Dataset
    facts: DataFacts
    label_names: list[str] = field(default_factory=list)


class Rows:
    """Collects encoded rows batch by batch, and counts what happens to the others.

    Args:
        name: "train" or "eval", for messages and facts.
        types: column -> Arrow type by name: "ids" (list of int32), "int", "text".
        max_length, too_long: tokens per row, and what becomes of longer ones.
    """

    def __init__(
        self,
        name: str,
        types: dict[str, str],
        max_length: int,
        too_long: Literal["truncate", "drop", "error"],
    ) -> None:
        self.name, self.types, self.max_length, self.too_long = name, types, max_length, too_long
        self.counts: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.size = 0
        self._waiting: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []

    def add(self, **values: Any) -> None:
        """Take a row."""
        self._waiting.append(values)
        self.size += 1
        if len(self._waiting) == BATCH:
            self._flush()

    def leave_out(self, reason: str) -> None:
        """Count a row that is not used."""
        self.left_out[reason] += 1

    def keeps(self, length: int, row: int, limit: int | None = None, setting: str = "max_length") -> bool:
        """Count a row of this many tokens and say whether it stays, to be cut if it is longer than the limit.

        Raises:
            RequestError: it is too long and `too_long` is "error".
        """
        limit = self.max_length if limit is None else limit
        if length <= limit:
            return True
        if self.too_long == "error":
            raise RequestError(
                f"{self.name} data, row {row} has {length} tokens, more than training.{setting} {limit}: "
                "raise it, or set training.too_long to truncate or drop"
            )
        self.counts["rows too long"] += 1
        if self.too_long == "drop":
            self.leave_out("too long")
        return self.too_long == "truncate"

    def finish(self, source: str, details: Mapping[str, Any], label_names: list[str] | None = None) -> Encoded:
        """Return the rows with their facts.

        Raises:
            RequestError: no row is left.
        """
        import datasets
        import pyarrow as pa

        left_out = {f"left out: {reason}": count for reason, count in self.left_out.items()}
        if not self.size:
            why = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            raise RequestError(f"{self.name} data ({source}): no row is left to use; left out: {why or 'none'}")
        self._flush()
        rows = datasets.Dataset(pa.Table.from_batches(self._batches, schema=self._schema()))
        facts = DataFacts(self.name, source, self.size, {**details, **self.counts, **left_out})
        return Encoded(rows, facts, label_names or [])

    def _schema(self) -> pa.Schema:
        import pyarrow as pa

        types = {"ids": pa.list_(pa.int32()), "int": pa.int64(), "text": pa.string()}
        return pa.schema([pa.field(name, types[kind]) for name, kind in self.types.items()])

    def _flush(self) -> None:
        import pyarrow as pa

        self._batches.append(pa.RecordBatch.from_pylist(self._waiting, schema=self._schema()))
        self._waiting = []


def batches(rows: datasets.Dataset) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Yield lists of (number from 1, row)."""
    names = rows.column_names
    number = 0
    for batch in rows.iter(batch_size=BATCH):
        columns = [batch[name] for name in names]
        made = []
        for values in zip(*columns, strict=True):
            number += 1
            made.append((number, dict(zip(names, values, strict=True))))
        yield made


def source_of(data: TextData, name: str) -> str:
    """Return how the recipe names the source of the "train" or "eval" rows."""
    if name == "eval" and data.eval is None:
        source = data.train if isinstance(data.train, str) else ", ".join(data.train)
        what = f"split {data.eval_split}" if data.eval_split is not None else f"{data.eval_fraction:.3g} held out"
        return f"{source} ({what})"
    source = data.train if name == "train" or data.eval is None else data.eval
    return source if isinstance(source, str) else ", ".join(source)
