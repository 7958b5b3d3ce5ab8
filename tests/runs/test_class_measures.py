"""Accuracy, F1 and the tables of classifiers, against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from lora_adapters.runs.class_measures import class_measures, likeliest


@pytest.mark.parametrize("classes", [2, 5, 30])
def test_like_scikit_learn(classes):
    draw = np.random.default_rng(classes)
    wanted, chosen = draw.integers(0, classes, 200).tolist(), draw.integers(0, classes, 200).tolist()
    labels = [f"class {i}" for i in range(classes)]
    found = class_measures(0.5, wanted, chosen, labels)
    assert found.metrics["loss"] == 0.5
    assert found.metrics["accuracy"] == pytest.approx(accuracy_score(wanted, chosen))
    present = sorted(set(wanted))
    assert found.metrics["macro_f1"] == pytest.approx(f1_score(wanted, chosen, labels=present, average="macro"))
    assert found.outputs == [labels[i] for i in chosen]
    per_class, matrix = found.tables
    theirs = zip(*precision_recall_fscore_support(wanted, chosen, labels=range(classes), zero_division=0), strict=True)
    for row, expected in zip(per_class.rows, theirs, strict=True):
        assert row[1:] == pytest.approx(list(expected))
    assert matrix.shaded
    assert [row[1:] for row in matrix.rows] == confusion_matrix(wanted, chosen, labels=range(classes)).tolist()


def test_many_classes_name_the_most_confused_ones():
    labels = [f"c{i}" for i in range(40)]
    wanted = [0] * 8 + [3] * 4 + [*range(40)]
    chosen = [1] * 8 + [5] * 2 + [3] * 2 + [*range(40)]
    per_class, confused = class_measures(0.0, wanted, chosen, labels).tables
    assert len(per_class.rows) == 40
    assert confused.title == "Most confused"
    assert confused.rows == [["c0", "c1", 8, 8 / 9], ["c3", "c5", 2, 2 / 5]]
    right = class_measures(0.0, [0, 1], [0, 1], labels)
    assert [table.title for table in right.tables] == ["Per class"]


def test_the_likeliest_are_named():
    logits = torch.tensor([1.0, 4.0, 2.0, 3.0]).log()
    assert likeliest(logits, ["a", "b", "c", "d"]) == "b 40.0%, d 30.0%, c 20.0%"
    assert likeliest(logits[:2].half(), ["a", "b"]) == "b 80.0%, a 20.0%"
