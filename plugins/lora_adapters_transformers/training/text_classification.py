"""The task text-classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import DataCollatorWithPadding

from lora_adapters.checkpoint import inspect_adapter
from lora_adapters.errors import RequestError
from lora_adapters.runs.class_measures import likeliest
from lora_adapters.runs.measuring import Measured, evaluating
from lora_adapters.runs.progress import Progress

from .. import head_facts
from ..data.classification import check_classification, encode_classification
from ..data.encoding import Encoded
from .measures import Collate, classification
from .runner import TextRunner


class ClassificationRunner(TextRunner):
    """Fine-tunes a text classifier."""

    task = "text-classification"
    higher_is_better = ("accuracy", "macro_f1")

    def check_columns(self, columns: Sequence[str]) -> None:
        """Check the columns; see `TextRunner.check_columns`."""
        check_classification(self.recipe.data, columns)

    def encode(self, rows: datasets.Dataset, name: str) -> Encoded:
        """Tokenize; the label names of the training rows become part of the recipe. See `TextRunner.encode`."""
        if name == "eval":
            _ = self.labels  # those of the eval rows alone may be in another order
        encoded = encode_classification(rows, self.recipe.data, self.recipe.training, self.tokenizer, name=name)
        if name == "train":
            self.recipe.data.labels = encoded.label_names
        return encoded

    @property
    def labels(self) -> list[str]:
        """The label names, in the order of the head's outputs."""
        labels = self.recipe.data.labels
        if labels is None:
            raise RequestError(
                "data.labels: the adapter does not say its labels. Give their names in the order it was trained with: "
                "'data.labels=[negative, positive]'."
            )
        return labels

    def accept(self, adapters: Mapping[str, Path]) -> None:
        """Take the labels that the adapters' files name, which must be one list."""
        data = self.recipe.data
        for name, folder in adapters.items():
            own = head_facts.read(inspect_adapter(folder)).get("labels")
            if own is None or own == [f"LABEL_{i}" for i in range(len(own))]:  # what transformers calls them unasked
                continue
            if data.labels is None:
                data.labels = own
            if own != data.labels:
                raise RequestError(
                    f"data.labels: {name} was trained for {', '.join(own)}, and this is measured for "
                    f"{', '.join(data.labels)}: classifiers with other labels, or another order, need a command each."
                )

    def model_options(self) -> dict[str, Any]:
        """Ask for a head with these labels; a head of other labels is replaced by a new one."""
        names = dict(enumerate(self.labels))
        return {
            "task": self.task,
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
            "ignore_mismatched_sizes": True,
            "problem_type": "single_label_classification",
        }

    def preview(self, progress: Progress) -> None:
        """Show the first row and its label."""
        assert self.train_rows is not None
        row = self.train_rows.rows[0]
        progress.say(f"first row, label {self.labels[row['labels']]!r}: {row['text'][:200]!r}")

    def collator(self, training: bool) -> Collate:
        """Pad ids with the pad token."""
        pad = DataCollatorWithPadding(self.padder)
        return lambda rows: dict(pad([{k: v for k, v in row.items() if k != "text"} for row in rows]))

    def measure(self, model: Any, rows: Any) -> Measured:
        """Return loss, accuracy and macro F1."""
        size = self.recipe.training.batch_size
        return classification(model, rows, self.labels, size, self.collator(False), self.autocast)

    def samples(self, model: Any, count: int, measured: Measured | None) -> list[list[tuple[str, str]]]:
        """Show the first texts with their true and predicted labels."""
        assert self.eval_rows is not None
        assert measured is not None
        return [
            [("text", row["text"]), ("label", self.labels[row["labels"]]), ("predicted", measured.outputs[i])]
            for i, row in enumerate(self.eval_rows.rows.select(range(count)))
        ]

    def respond(self, model: Any, prompt: str, **_: Any) -> str:
        """Return the likeliest labels of one text with their probabilities."""
        batch = self.tokenizer(prompt, truncation=True, max_length=self.recipe.training.max_length, return_tensors="pt")
        with evaluating(model, self.autocast) as device:
            return likeliest(model(**batch.to(device)).logits[0], self.labels)
