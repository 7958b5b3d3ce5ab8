"""The task seq2seq."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from transformers import DataCollatorForSeq2Seq

from lora_adapters.runs.measuring import Measured
from lora_adapters.runs.progress import Progress

from ..data.encoding import Encoded
from ..data.preview import preview, show
from ..data.rouge import rouge
from ..data.seq2seq import check_seq2seq, encode_seq2seq
from .measures import Collate, language_model
from .runner import TextRunner
from .writing import write


class Seq2SeqRunner(TextRunner):
    """Fine-tunes an encoder-decoder to write a target from a source."""

    task = "seq2seq"
    higher_is_better = ("token_accuracy", "rouge1", "rouge2", "rougeL")

    def check_columns(self, columns: Sequence[str]) -> None:
        """Check the columns; see `TextRunner.check_columns`."""
        check_seq2seq(self.recipe.data, columns)

    def encode(self, rows: datasets.Dataset, name: str) -> Encoded:
        """Tokenize; see `TextRunner.encode`."""
        return encode_seq2seq(rows, self.recipe.data, self.recipe.training, self.tokenizer, name=name)

    def preview(self, progress: Progress) -> None:
        """Show the first row: the source is given, the target is learnt."""
        assert self.train_rows is not None
        row = self.train_rows.rows[0]
        given = preview({"input_ids": row["input_ids"], "labels": [-100] * len(row["input_ids"])}, self.tokenizer)
        learnt = preview({"input_ids": row["labels"], "labels": row["labels"]}, self.tokenizer)
        if not progress.quiet:
            show([*given, ("\n", False), *learnt])

    def collator(self, training: bool) -> Collate:
        """Pad ids with the pad token and labels with -100."""
        pad = DataCollatorForSeq2Seq(self.padder)
        return lambda rows: dict(pad([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows]))

    def measure(self, model: Any, rows: Any) -> Measured:
        """Return loss, perplexity and accuracy per token, and ROUGE of what the model writes."""
        training = self.recipe.training
        measured = language_model(model, rows, training.batch_size, self.collator(False), self.autocast)
        measured.outputs = [self._write(model, row["input_ids"]) for row in rows]
        measured.metrics |= rouge(measured.outputs, list(rows["target_text"]))
        return measured

    def _write(self, model: Any, ids: list[int], **options: Any) -> str:
        training = self.recipe.training
        settings = {"max_new_tokens": training.max_target_length, "beams": training.beams, **options}
        return write(model, self.tokenizer, ids, self.autocast, **settings)

    def samples(self, model: Any, count: int, measured: Measured | None) -> list[list[tuple[str, str]]]:
        """Show what was written for the first sources."""
        assert self.eval_rows is not None
        assert measured is not None
        rows = self.eval_rows.rows.select(range(count))
        return [
            [
                ("source", str(self.tokenizer.decode(row["input_ids"], skip_special_tokens=True))),
                ("expected", row["target_text"]),
                ("answer", measured.outputs[i]),
            ]
            for i, row in enumerate(rows)
        ]

    def respond(self, model: Any, prompt: str, *, raw: bool = False, **options: Any) -> str:
        """Write the target of one source."""
        torch.manual_seed(options.pop("seed", 0))
        limit = self.recipe.training.max_length
        ids = self.tokenizer(prompt, truncation=True, max_length=limit)["input_ids"]
        return self._write(model, list(ids), **options)  # type: ignore[arg-type]
