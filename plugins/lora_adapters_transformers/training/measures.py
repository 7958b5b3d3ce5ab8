"""Metrics of a model on encoded rows. The same functions serve before, during and after training, and `eval`.

Losses are means over tokens (or rows) of the whole data, not means of batches' means, which weigh short batches more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_adapters.runs.class_measures import class_measures
from lora_adapters.runs.measuring import Measured, evaluating

#: rows -> batch of tensors.
Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


def batches(rows: Any, size: int, collate: Collate, device: torch.device, length: Callable[[dict[str, Any]], int]):
    """Yield (indices, batch), rows of like length together, the longest first: memory fails at once or not at all."""
    lengths = [length(row) for row in rows]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        batch = collate([rows[i] for i in indices])
        yield indices, {name: value.to(device) for name, value in batch.items()}


def token_losses(logits: Tensor, labels: Tensor) -> tuple[float, int, int]:
    """Return (sum of cross entropies, tokens right, tokens) where labels (batch, tokens) are not -100, in float32.

    One row at a time: the float32 copy of a batch's logits can be larger than the model.
    """
    total, right, count = 0.0, 0, 0
    for row_logits, row_labels in zip(logits, labels, strict=True):
        kept = row_labels != -100
        chosen, wanted = row_logits[kept].float(), row_labels[kept]
        total += float(torch.nn.functional.cross_entropy(chosen, wanted, reduction="sum")) if len(wanted) else 0.0
        right += int((chosen.argmax(-1) == wanted).sum())
        count += len(wanted)
    return total, right, count


def language_model(model: Any, rows: Any, size: int, collate: Collate, autocast: torch.dtype | None) -> Measured:
    """Return loss, perplexity = exp(loss) and accuracy per token; of a decoder (labels shifted here) or a seq2seq model."""
    shifted = not model.config.is_encoder_decoder
    total, right, count = 0.0, 0, 0
    with evaluating(model, autocast) as device:
        for _, batch in batches(rows, size, collate, device, lambda row: len(row["input_ids"])):
            labels = batch["labels"]
            # A seq2seq model makes its decoder's inputs from the labels.
            given = {k: v for k, v in batch.items() if k != "labels"} if shifted else batch
            logits = model(**given, **({"use_cache": False} if shifted else {})).logits
            if shifted:
                logits, labels = logits[:, :-1], labels[:, 1:]
                if "attention_mask" in batch:  # the first token of a row that is padded on the left follows nothing
                    labels = labels.masked_fill(batch["attention_mask"][:, :-1] == 0, -100)
            losses = token_losses(logits, labels)
            total, right, count = total + losses[0], right + losses[1], count + losses[2]
    loss = total / max(1, count)
    perplexity = float(torch.tensor(loss, dtype=torch.float64).exp())
    return Measured({"loss": loss, "perplexity": perplexity, "token_accuracy": right / max(1, count)})


def classification(
    model: Any, rows: Any, labels: Sequence[str], size: int, collate: Collate, autocast: torch.dtype | None
) -> Measured:
    """Return loss, accuracy and macro F1, with a table per class and the confusion matrix."""
    chosen = [0] * len(rows)
    total = 0.0
    with evaluating(model, autocast) as device:
        for indices, batch in batches(rows, size, collate, device, lambda row: len(row["input_ids"])):
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
            total += float(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
            for index, answer in zip(indices, logits.argmax(-1).tolist(), strict=True):
                chosen[index] = answer
    wanted = list(rows["labels"])
    return class_measures(total / len(rows), wanted, chosen, labels)


def preference(model: Any, rows: Any, size: int, collate: Collate, autocast: torch.dtype | None) -> Measured:
    """Return the Bradley-Terry loss -log sigmoid(r_chosen - r_rejected), accuracy (r_chosen > r_rejected) and margin."""
    differences = [0.0] * len(rows)
    outputs = [""] * len(rows)
    with evaluating(model, autocast) as device:

        def length(row: dict[str, Any]) -> int:
            return max(len(row["chosen_ids"]), len(row["rejected_ids"]))

        for indices, batch in batches(rows, size, collate, device, length):
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            better, worse = model(**given).logits.float().squeeze(-1).chunk(2)
            for index, a, b in zip(indices, better.tolist(), worse.tolist(), strict=True):
                differences[index], outputs[index] = a - b, f"{a:.3f} against {b:.3f}"
    margins = torch.tensor(differences, dtype=torch.float64)
    metrics = {
        "loss": float(-torch.nn.functional.logsigmoid(margins).mean()),
        "accuracy": float((margins > 0).double().mean()),
        "margin": float(margins.mean()),
    }
    return Measured(metrics, outputs=outputs)
