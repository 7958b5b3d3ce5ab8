"""Steps of a training loop as a recipe's `training:` means them: how many, when to save, the learning rate of each.

They are counted as transformers' Trainer counts them, so that a key means the same in every task.
"""

from __future__ import annotations

import math

from ..recipes.sections import TrainingSection


def steps_per_epoch(training: TrainingSection, rows: int) -> int:
    """Return the number of optimizer steps of one pass over so many rows; the last one may be of fewer rows."""
    return steps_of(training, math.ceil(rows / training.batch_size))


def steps_of(training: TrainingSection, batches: int, processes: int = 1) -> int:
    """Return the number of optimizer steps of one pass over so many batches, which so many processes share."""
    return math.ceil(batches / (training.gradient_accumulation * processes))


def steps_in_all(training: TrainingSection, rows: int) -> int:
    """Return the number of optimizer steps of the run."""
    return total_steps(training, steps_per_epoch(training, rows))


def total_steps(training: TrainingSection, per_epoch: int) -> int:
    """Return the number of optimizer steps of the run, of which so many are one pass over the data."""
    return training.max_steps or max(1, math.ceil(training.epochs * per_epoch))


def save_every(training: TrainingSection, total: int) -> int:
    """Return the number of steps between checkpoints, of a run of `total` steps."""
    return training.save_every or max(1, math.ceil(total / 10))


def learning_rate_share(training: TrainingSection, step: int, total: int) -> float:
    """Return the share (0 to 1) of `training.learning_rate` that the step after `step` of `total` steps takes.

    It grows evenly while warming up; "cosine" is that of SGDR without restarts (arXiv:1608.03983, eq. 5).
    """
    warmup = math.ceil(total * training.warmup) if training.warmup < 1 else int(training.warmup)
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, total - warmup)
    if training.schedule == "linear":
        return max(0.0, 1 - done)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * done))) if training.schedule == "cosine" else 1.0
