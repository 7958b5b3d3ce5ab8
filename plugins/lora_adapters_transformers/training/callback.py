"""What a run adds to Trainer: it shows and records the steps, stops when asked, guards against NaN, keeps checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_adapters.runs.gradients import GradientGuard
from lora_adapters.runs.keeping import keep_checkpoint
from lora_adapters.runs.runner import Run
from lora_adapters.runs.showing import Rates, Steps


class Counter:
    """Counts the tokens and rows that a collator puts into batches.

    Args:
        collate: rows -> batch of tensors, with input_ids.
        rates: counts "tokens", what fills rows up not among them, and "rows".
    """

    def __init__(self, collate: Any, rates: Rates) -> None:
        self.collate, self.rates = collate, rates

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        """Return the batch that `collate` makes."""
        batch = self.collate(rows)
        mask = batch.get("attention_mask")
        tokens = int(mask.sum()) if mask is not None else batch["input_ids"].numel()
        self.rates.add(tokens=tokens, rows=len(rows))
        return batch


class RunCallback(TrainerCallback):
    """Ties Trainer to a `Run`. Comes after LoraCallback, whose checkpoint it completes."""

    def __init__(self, run: Run, steps: Steps, guard: GradientGuard) -> None:
        self.run, self.steps, self.guard = run, steps, guard

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin to show and to measure."""
        self.steps.begin(state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Show the step; end here if the user asked for it, or if there is nothing finite to save."""
        self.steps.done(state.global_step, float(state.epoch or 0))
        if self.run.stop.requested is not None:
            control.should_save = control.should_training_stop = True
        trained = (p for p in model.parameters() if p.requires_grad)
        if control.should_save and not self.guard.holds(trained, state.global_step):
            control.should_save, control.should_training_stop = False, True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write a line of metrics.jsonl."""
        if logs and "train_runtime" not in logs:  # Trainer's own summary of the end
            self.steps.log(state.global_step, logs)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Look at the gradients before they change the weights."""
        if not args.fp16:  # its loss scaler looks itself, and skips
            self.guard.passes(model.parameters(), state.global_step + 1)
            self._stop_if_diverged(control)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Count what float16's loss scaler skipped."""
        if args.fp16 and getattr(optimizer, "step_was_skipped", False):
            self.guard.skipped(state.global_step + 1)
            self._stop_if_diverged(control)
        elif args.fp16:
            self.guard.taken()

    def _stop_if_diverged(self, control: TrainerControl) -> None:
        if self.guard.diverged:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Declare the checkpoint whole."""
        keep_checkpoint(self.run, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
