"""The task causal-lm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from transformers import DataCollatorForSeq2Seq

from lora_adapters.runs.measuring import Measured
from lora_adapters.runs.progress import Progress

from ..data.causal import check_causal, encode_causal
from ..data.encoding import Encoded
from ..data.packing import check_packing, collate_packed, pack, packing_facts, row_to_check
from ..data.preview import preview, show
from .measures import Collate, language_model
from .runner import TextRunner
from .writing import chat_prompt, write

#: Tokens of an answer in the report.
_SAMPLE_TOKENS = 96


class CausalLMRunner(TextRunner):
    """Fine-tunes a causal language model on text, instructions or chats."""

    task = "causal-lm"
    higher_is_better = ("token_accuracy",)

    def check_columns(self, columns: Sequence[str]) -> None:
        """Check the columns; see `TextRunner.check_columns`."""
        check_causal(self.recipe.data, columns)

    def encode(self, rows: datasets.Dataset, name: str) -> Encoded:
        """Tokenize, and pack the training rows if the recipe says so; see `TextRunner.encode`."""
        training = self.recipe.training
        encoded = encode_causal(rows, self.recipe.data, training, self.tokenizer, name=name)
        if name == "train":
            self.first_row = encoded.rows[0]
            if training.packing:
                encoded.rows = pack(encoded.rows, training.max_length)
                encoded.facts.details |= packing_facts(encoded.rows, training.max_length)
        return encoded

    def preview(self, progress: Progress) -> None:
        """Show the first row, decoded, with what is learnt of it."""
        if not progress.quiet:
            show(preview(self.first_row, self.tokenizer))

    def collator(self, training: bool) -> Collate:
        """Pad ids with the pad token and labels with -100; packed rows with pads that nothing sees."""
        if training and self.recipe.training.packing:
            pad = self.tokenizer.pad_token_id
            return lambda rows: collate_packed(rows, pad)
        pad = DataCollatorForSeq2Seq(self.padder)
        return lambda rows: dict(pad([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows]))

    def _check_model(self, model: Any) -> None:
        if not self.recipe.training.packing:
            return
        assert self.train_rows is not None
        row = row_to_check(self.train_rows.rows)
        if row is not None:
            check_packing(model, row)

    def measure(self, model: Any, rows: Any) -> Measured:
        """Return loss, perplexity and accuracy over the tokens that have a label."""
        return language_model(model, rows, self.recipe.training.batch_size, self.collator(False), self.autocast)

    def samples(self, model: Any, count: int, measured: Measured | None) -> list[list[tuple[str, str]]]:
        """Answer the first prompts; plain text is continued after its first half."""
        assert self.eval_rows is not None
        found = []
        for row in self.eval_rows.rows.select(range(count)):
            if row["prompt_ids"]:
                ids, shown = row["prompt_ids"], [("prompt", row["prompt_text"]), ("expected", row["answer_text"])]
            else:
                half = max(1, len(row["input_ids"]) // 2)
                ids, rest = row["input_ids"][:half], row["input_ids"][half : half + _SAMPLE_TOKENS]
                shown = [("text", self._decode(ids)), ("went on", self._decode(rest))]
            answer = write(model, self.tokenizer, ids, self.autocast, max_new_tokens=_SAMPLE_TOKENS)
            found.append([*shown, ("answer", answer)])
        return found

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def respond(self, model: Any, prompt: str, *, raw: bool = False, **options: Any) -> str:
        """Answer a prompt, through the chat template where the recipe trains through it."""
        ids = chat_prompt(self.tokenizer, prompt, None if raw else self.recipe.data)
        torch.manual_seed(options.pop("seed", 0))
        return write(model, self.tokenizer, ids, self.autocast, **options)
