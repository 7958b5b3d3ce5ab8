"""How well classes were chosen: accuracy and macro F1, a table per class, the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..report.facts import Table
from .measuring import Measured

#: With more classes than this the confusion matrix is too wide to read.
_MATRIX = 30
#: Pairs of classes that are named as the most confused ones.
_PAIRS = 15
#: Labels that an answer names with their probabilities.
_NAMED = 3


def class_measures(loss: float, wanted: Sequence[int], chosen: Sequence[int], labels: Sequence[str]) -> Measured:
    """Return loss, accuracy and macro F1 (of the classes that occur) with tables; the outputs are the chosen labels.

    Args:
        loss: the mean over the rows.
        wanted, chosen: for each row the index of its true and of its chosen label.
        labels: the names of the classes.
    """
    confusion = [[0] * len(labels) for _ in labels]
    for truth, answer in zip(wanted, chosen, strict=True):
        confusion[truth][answer] += 1
    per_class = [_scores(confusion, i) for i in range(len(labels))]
    present = [scores for scores in per_class if scores[3]]
    metrics = {
        "loss": loss,
        "accuracy": sum(t == c for t, c in zip(wanted, chosen, strict=True)) / len(wanted),
        "macro_f1": sum(scores[2] for scores in present) / len(present),
    }
    tables = [
        Table(
            "Per class",
            ["label", "precision", "recall", "F1", "rows"],
            [[n, *s] for n, s in zip(labels, per_class, strict=True)],
        )
    ]
    if len(labels) <= _MATRIX:
        counts = [[name, *row] for name, row in zip(labels, confusion, strict=True)]
        tables.append(Table("Confusion matrix (rows: true label)", ["", *labels], counts, shaded=True))
    elif pairs := _most_confused(confusion, labels):
        tables.append(Table("Most confused", ["true label", "taken for", "rows", "share of its rows"], pairs))
    return Measured(metrics, tables, [labels[answer] for answer in chosen])


def likeliest(logits: Tensor, labels: Sequence[str]) -> str:
    """Return the likeliest labels of one row with their probabilities, in words; logits (labels,)."""
    shares, indices = torch.softmax(logits.float(), -1).topk(min(_NAMED, len(labels)))
    return ", ".join(f"{labels[i]} {p:.1%}" for p, i in zip(shares.tolist(), indices.tolist(), strict=True))


def _most_confused(confusion: list[list[int]], labels: Sequence[str]) -> list[list[str | int | float]]:
    """Return (true label, chosen label, rows, their share of the true label's rows) of the most frequent mistakes."""
    wrong = [(n, i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) if n and i != j]
    wrong.sort(key=lambda pair: (-pair[0], pair[1:]))
    return [[labels[i], labels[j], n, n / sum(confusion[i])] for n, i, j in wrong[:_PAIRS]]


def _scores(confusion: list[list[int]], i: int) -> tuple[float, float, float, int]:
    """Return precision, recall, F1 and the number of rows of one class."""
    right, answered, true = confusion[i][i], sum(row[i] for row in confusion), sum(confusion[i])
    precision, recall = right / max(1, answered), right / max(1, true)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return precision, recall, f1, true
