"""What a run adds to Trainer: it shows and records the steps, stops when asked, guards against NaN, keeps checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_adapters.runs import checkpoints, measured
from lora_adapters.runs.runner import DivergedError, Run

#: With `nan: skip`, and where float16's loss scaling skips steps by itself: so many in a row, and the run has diverged.
_SKIPPED_IN_A_ROW = 25


class Counter:
    """Counts the tokens and rows that a collator puts into batches.

    Args:
        collate: rows -> batch of tensors, with input_ids.
        pad: id that fills rows up, not counted where the batch has an attention mask.
    """

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.tokens, self.rows = 0, 0

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        """Return the batch that `collate` makes."""
        batch = self.collate(rows)
        self.rows += len(rows)
        mask = batch.get("attention_mask")
        self.tokens += int(mask.sum()) if mask is not None else batch["input_ids"].numel()
        return batch


class RunCallback(TrainerCallback):
    """Ties Trainer to a `Run`. Comes after LoraCallback, whose checkpoint it completes."""

    def __init__(self, run: Run, counter: Counter, device: torch.device) -> None:
        self.run, self.counter, self.device = run, counter, device
        self.policy = run.recipe.training.nan
        self.diverged = ""
        self._in_a_row = 0
        self._last: dict[str, float] = {}

    # ---- showing -----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin to show and to measure."""
        self.run.facts.total_steps = state.max_steps
        self.run.progress.start("training", state.max_steps, state.global_step)
        self._began, self._tokens, self._rows = time.monotonic(), self.counter.tokens, self.counter.rows

    def rates(self) -> dict[str, float]:
        """Return tokens and rows per second since training began."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        return {
            "tokens": (self.counter.tokens - self._tokens) / seconds,
            "rows": (self.counter.rows - self._rows) / seconds,
        }

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show the step; end here if the user asked for it."""
        self.run.facts.steps, self.run.facts.epochs = state.global_step, float(state.epoch or 0)
        self.run.progress.update(
            state.global_step, memory=measured.now(self.device), rates={"tokens": self.rates()["tokens"]}, **self._last
        )
        if self.run.stop.requested is not None:
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write a line of metrics.jsonl."""
        if not logs or "train_runtime" in logs:  # Trainer's own summary of the end
            return
        row = {"step": state.global_step, **logs}
        if "loss" in logs:
            self._last = {"loss": float(logs["loss"])}
            row |= {f"{name}_per_second": rate for name, rate in self.rates().items()}
            row["memory"] = measured.now(self.device)
        self.run.folder.append(row)

    # ---- gradients that are not finite -------------------------------------------------------------------------------

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Look at the gradients before they change the weights."""
        if args.fp16:  # the loss scaler looks itself, and skips
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            self._in_a_row = 0
            return
        step = state.global_step + 1
        if self.policy == "raise":
            raise DivergedError(
                f"The gradient of step {step} is not finite (training.nan is raise). Nothing was saved."
            )
        for parameter in model.parameters():
            parameter.grad = None  # the optimizer passes parameters without a gradient over
        self._skipped(step, control)
        if self.policy == "stop":
            self._stop(f"The gradient of step {step} is not finite.", control)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Count what float16's loss scaler skipped: some are normal, many in a row are not."""
        if args.fp16 and getattr(optimizer, "step_was_skipped", False):
            self._skipped(state.global_step + 1, control)
        elif args.fp16:
            self._in_a_row = 0

    def _skipped(self, step: int, control: TrainerControl) -> None:
        self.run.facts.skipped_steps += 1
        self._in_a_row += 1
        if self._in_a_row >= _SKIPPED_IN_A_ROW:
            self._stop(f"The gradients of the {self._in_a_row} steps up to step {step} are not finite.", control)

    def _stop(self, reason: str, control: TrainerControl) -> None:
        self.diverged = reason
        control.should_training_stop = True

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Declare the checkpoint whole, then let go of older ones."""
        folder = Path(str(args.output_dir))
        checkpoints.complete(folder / f"checkpoint-{state.global_step}")
        checkpoints.prune(folder, self.run.recipe.training.keep_checkpoints)
        self.run.folder.write_facts(self.run.facts)
