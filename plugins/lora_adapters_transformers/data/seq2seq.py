"""Encoder-decoders: sources and targets to tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lora_adapters_transformers.data.encoded import Encoded, Rows, batches, source_of
from lora_adapters_transformers.data.plain import ended
from lora_adapters_transformers.data.templates import Template

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from lora_adapters_transformers.recipes import Seq2SeqData, Seq2SeqTraining


def check_seq2seq(data: Seq2SeqData, columns: Iterable[str]) -> tuple[Template, Template]:
    """Return the templates of source and target, before any model is loaded.

    Raises:
        RequestError: a column is unknown.
    """
    columns = list(columns)
    return Template(data.source, columns, "data.source"), Template(data.target, columns, "data.target")


def encode_seq2seq(
    rows: datasets.Dataset,
    data: Seq2SeqData,
    training: Seq2SeqTraining,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "train",
) -> Encoded:
    """Return rows for an encoder-decoder, in the order of the data.

    Columns: `input_ids` (at most `max_length`), `labels` (at most `max_target_length`, ending in the end token),
    `source_text`, `target_text`. Cutting keeps the special tokens. Rows without a source or target are left out and
    counted.

    Raises:
        RequestError: a column is unknown or no text, or no row is left.
    """
    from_row, to_row = check_seq2seq(data, rows.column_names)
    types = {"input_ids": "ids", "labels": "ids", "source_text": "text", "target_text": "text"}
    made = Rows(name, types, training.max_length, training.too_long)
    tokens = target_tokens = 0
    for batch in batches(rows):
        filled = [(number, from_row.fill(row), to_row.fill(row)) for number, row in batch]
        kept = [(number, a, b) for number, a, b in filled if a is not None and b is not None]
        for _ in range(len(filled) - len(kept)):
            made.leave_out("empty")
        if not kept:
            continue
        sources = tokenizer([a for _, a, _ in kept], verbose=False)["input_ids"]
        targets = tokenizer(text_target=[b for _, _, b in kept], verbose=False)["input_ids"]
        for (number, a, b), ids, labels in zip(kept, sources, targets, strict=True):
            labels = ended(labels, tokenizer)
            limit = training.max_target_length
            if len(ids) > training.max_length:
                keeps = made.keeps(len(ids), number)
            else:
                keeps = made.keeps(len(labels), number, limit, "max_target_length")
            if not keeps:
                continue
            if len(ids) > training.max_length or len(labels) > limit:
                ids = tokenizer(a, truncation=True, max_length=training.max_length)["input_ids"]
                labels = tokenizer(text_target=b, truncation=True, max_length=limit)["input_ids"]
                if labels[-1] != tokenizer.eos_token_id:
                    labels = ended(labels[: limit - 1], tokenizer)
            tokens, target_tokens = tokens + len(ids), target_tokens + len(labels)
            made.add(input_ids=ids, labels=labels, source_text=a, target_text=b)
    details = {"tokens": tokens + target_tokens, "answer tokens": target_tokens}
    return made.finish(source_of(data, name), details)
