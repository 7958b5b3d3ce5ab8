"""Text classification: texts to tokens, labels to ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from lora_adapters.errors import RequestError
from lora_adapters_transformers.data.columns import text_of
from lora_adapters_transformers.data.encoded import Encoded, Rows, batches, source_of
from lora_adapters_transformers.data.templates import Template, unknown_column

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from lora_adapters_transformers.recipes import ClassificationData, TextTraining


def check_classification(data: ClassificationData, columns: Iterable[str]) -> tuple[Template, Template | None]:
    """Return the templates of text and second text, before any model is loaded.

    Raises:
        RequestError: a column is unknown, or `labels` are fewer than two or name one twice.
    """
    columns = list(columns)
    text = Template(data.text, columns, "data.text")
    pair = None if data.text_pair is None else Template(data.text_pair, columns, "data.text_pair")
    if data.label not in columns:
        raise RequestError(unknown_column(data.label, columns, "data.label"))
    if data.labels is not None:
        twice = [name for name, count in Counter(data.labels).items() if count > 1]
        if twice or len(data.labels) < 2:
            raise RequestError(f"data.labels: {f'{twice[0]!r} is named twice' if twice else 'name at least two'}")
    return text, pair


def encode_classification(
    rows: datasets.Dataset,
    data: ClassificationData,
    training: TextTraining,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "train",
    label_names: list[str] | None = None,
) -> Encoded:
    """Return rows for a text classifier, in the order of the data.

    Columns: `input_ids` (list of int), `token_type_ids` if the tokenizer gives them, `labels` (int), `text`. Texts longer
    than `training.max_length` are cut as the tokenizer does, its special tokens kept.

    Label names are `data.labels`, else `label_names`, else those of the dataset's own ClassLabel, else those of the rows,
    sorted (as numbers if all are). Where `data.labels` are given and the column has numbers, these are their indices.
    Rows without a text or a label are left out and counted.

    Args:
        label_names: those of the training data, for evaluation data.

    Raises:
        RequestError: a label is unknown (with the nearest), there is just one, or no row is left.
    """
    text, pair = check_classification(data, rows.column_names)
    label_ids = _LabelIds(rows, data, label_names, name)
    with_types = "token_type_ids" in tokenizer("a")
    types = {"input_ids": "ids", **({"token_type_ids": "ids"} if with_types else {}), "labels": "int", "text": "text"}
    made = Rows(name, types, training.max_length, training.too_long)
    tokens, counts = 0, Counter()
    for batch in batches(rows):
        kept = []
        for number, row in batch:
            texts = [text.fill(row)] if pair is None else [text.fill(row), pair.fill(row)]
            label = label_ids.of(row[data.label], number)
            if None in texts or label is None:
                made.leave_out("empty" if None in texts else "no label")
            else:
                kept.append((number, texts, label))
        for (_, texts, label), encoding in zip(kept, _cut(kept, made, tokenizer), strict=True):
            if encoding is None:
                continue
            counts[label_ids.names[label]] += 1
            tokens += len(encoding["input_ids"])
            made.add(**encoding, labels=label, text="\n".join(texts))
    details = {"tokens": tokens, "labels": ", ".join(f"{key} {counts[key]}" for key in label_ids.names[:20])}
    return made.finish(source_of(data, name), details, label_ids.names)


def _cut(kept: list, made: Rows, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]] | None]:
    """Return each row's tokens, cut to the length; None for rows that are dropped."""
    if not kept:
        return []

    def encode(rows: list, **how: Any) -> list[dict[str, list[int]]]:
        out = tokenizer(*map(list, zip(*(texts for _, texts, _ in rows), strict=True)), verbose=False, **how)
        names = [key for key in made.types if key in out]
        return [{key: out[key][i] for key in names} for i in range(len(rows))]

    encodings: list[dict[str, list[int]] | None] = list(encode(kept))
    for i, (number, _, _) in enumerate(kept):
        encoding = encodings[i]
        assert encoding is not None
        length = len(encoding["input_ids"])
        if not made.keeps(length, number):
            encodings[i] = None
        elif length > made.max_length:
            encodings[i] = encode([kept[i]], truncation=True, max_length=made.max_length)[0]
    return encodings


class _LabelIds:
    """From what a label column holds to the index of a name."""

    def __init__(self, rows: Any, data: ClassificationData, names: list[str] | None, part: str) -> None:
        import datasets

        feature = rows.features[data.label]
        if not isinstance(feature, (datasets.Value, datasets.ClassLabel)):
            raise RequestError(f"data.label: column {data.label!r} holds lists or mappings, where one label is needed")
        self.column, self.part, self.given = data.label, part, data.labels is not None
        self.own = feature.names if isinstance(feature, datasets.ClassLabel) else None
        found = {self._text(value) for value in rows.unique(data.label)} - {None}
        self.names = data.labels or names or self.own or _sorted({str(label) for label in found})
        self._ids = {label: i for i, label in enumerate(self.names)}
        indices = {str(i): i for i in range(len(self.names))}
        if data.labels and self.own is None and _numbers(found) and not _numbers(self.names):
            self._ids = indices
        if len(self.names) < 2:
            raise RequestError(
                f"data.label: all rows of the {part} data have the label {next(iter(self.names), None)!r}: "
                "at least two are needed (name them in data.labels if others are to come)"
            )

    def of(self, value: Any, row: int) -> int | None:
        """Return the id of a cell, None if it is empty.

        Raises:
            RequestError: no such label.
        """
        label = self._text(value)
        if label is None or label in self._ids:
            return None if label is None else self._ids[label]
        near = get_close_matches(label, list(self._ids), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        whose = "data.labels" if self.given else "the training data's labels"
        shown = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
        raise RequestError(f"{self.part} data, row {row}: label {label!r} is none of {whose}{hint} Labels: {shown}")

    def _text(self, value: Any) -> str | None:
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if self.own is not None and isinstance(value, int):
            return self.own[value] if value >= 0 else None
        if isinstance(value, float):
            if value != value:
                return None
            if not value.is_integer():
                raise RequestError(
                    f"data.label: column {self.column!r} holds {value}, a measure rather than a class: classes are needed"
                )
            value = int(value)
        return text_of(value).strip()


def _sorted(names: set[str]) -> list[str]:
    return sorted(names, key=int) if _numbers(names) else sorted(names)


def _numbers(labels: Iterable[str | None]) -> bool:
    return all(label is not None and re.fullmatch("-?[0-9]+", label) for label in labels)
