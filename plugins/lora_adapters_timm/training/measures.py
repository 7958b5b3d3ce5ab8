"""How well a model sorts images: the same function before, during and after training, and for `eval`."""

from __future__ import annotations

from typing import Any

import torch

from lora_adapters.runs.class_measures import class_measures
from lora_adapters.runs.measuring import Measured, evaluating

from ..augmentation import Prepared

#: Classes among which the right one must be, for the second accuracy.
_TOP = 5


def measure(
    model: Any, prepared: Prepared, labels: list[str], size: int, workers: int, place: Any, autocast: torch.dtype | None
) -> Measured:
    """Return loss (the mean over images), accuracy, top-5 accuracy (of more than five classes) and macro F1, with tables.

    Args:
        model: images (rows, channels, height, width) -> logits (rows, classes).
        prepared: the images, with a transform that draws nothing.
        labels: class names in the order of the outputs.
        size: images in a batch.
        workers: processes that read.
        place: puts a batch of images where the model is.
        autocast: dtype of the computation; None for the weights' own.
    """
    loss, top, chosen, wanted, sure = 0.0, 0, [], [], []
    keys = ([(0, i) for i in range(first, min(first + size, len(prepared)))] for first in range(0, len(prepared), size))
    with evaluating(model, autocast):
        for images, truth in prepared.batches(keys, workers):
            logits = model(place(images)).float()
            truth = truth.to(logits.device)
            loss += float(torch.nn.functional.cross_entropy(logits, truth, reduction="sum"))
            best, answers = torch.softmax(logits, -1).max(-1)
            # Classes that are likelier than the right one, and of equals those that come first, as argmax takes them.
            right = logits.gather(1, truth[:, None])
            order = torch.arange(logits.shape[1], device=logits.device)
            before = (logits > right) | ((logits == right) & (order < truth[:, None]))
            top += int(((before.sum(-1) < _TOP) & right[:, 0].isfinite()).sum())
            chosen += answers.tolist()
            wanted += truth.tolist()
            sure += best.tolist()
    measured = class_measures(loss / len(wanted), wanted, chosen, labels)
    if len(labels) > _TOP:
        measured.metrics["top5_accuracy"] = top / len(wanted)
    measured.outputs = [f"{labels[answer]} {share:.1%}" for answer, share in zip(chosen, sure, strict=True)]
    return measured
