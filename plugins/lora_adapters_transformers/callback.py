"""LoRA for transformers' Trainer, as a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import lora_adapters
from lora_adapters.errors import StateError


class LoraCallback(TrainerCallback):
    """Attaches a LoRA adapter when constructed, and looks after it while Trainer trains.

        lora = LoraCallback(model, rank=16, quantization="nf4")
        trainer = Trainer(model=lora.model, args=args, train_dataset=data, callbacks=[lora])
        trainer.train()

    It logs the trainable share and the adapter's norms, writes the adapter (never the base) at each save as one act
    with a digest, and can merge at the end. Resuming, `load_best_model_at_end`, evaluation, gradient checkpointing and
    `push_to_hub` are Trainer's own and work, because `lora.model` is a PeftModel.

    Args:
        model: a transformers model, dense or already quantized. A dense one is quantized here, before Trainer moves it.
        merge_at_end: fold the adapter into the base after training (after the best checkpoint was loaded). The last
            checkpoint on disk still holds the adapter alone.
        **attach_arguments: everything `lora_adapters.attach` takes: rank, alpha, targets, dropout, quantization, ...

    Raises:
        StateError: `model` instead of `lora.model` was given to Trainer, `model_init` was used, or the callback came
            through `add_callback` after Trainer was constructed.
    """

    def __init__(
        self, model: nn.Module, rank: int = 16, *, merge_at_end: bool = False, **attach_arguments: Any
    ) -> None:
        config = attach_arguments.get("config")
        if config is None and "r" not in attach_arguments:
            attach_arguments["rank"] = rank
        self.adapter = lora_adapters.attach(model, **attach_arguments)
        self.merge_at_end = merge_at_end
        self._constructed_with_trainer = False

    @property
    def model(self) -> nn.Module:
        """Return the PeftModel to give to Trainer."""
        return self.adapter.model

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that Trainer got the adapted model."""
        self._check_model(kwargs.get("model"))
        self._constructed_with_trainer = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check again: `model_init` replaces the model when training begins."""
        if not self._constructed_with_trainer:
            raise StateError(
                "LoraCallback was added after Trainer was constructed. Give it at construction: "
                "Trainer(model=lora.model, callbacks=[lora], ...)."
            )
        self._check_model(kwargs.get("model"))

    def _check_model(self, given: Any) -> None:
        if given is self.model:
            return
        if given is self.adapter.base:
            raise StateError(
                "Trainer got the bare model, which would save the whole base and could not resume. Give it the adapted "
                "one: Trainer(model=lora.model, callbacks=[lora], ...)."
            )
        raise StateError(
            "Trainer trains another model than LoraCallback adapted. With model_init, Trainer builds a new model whose "
            "adapter would be lost: use Trainer(model=lora.model, callbacks=[lora], ...) instead of model_init."
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the adapter's norms and the trainable share to what was logged."""
        if not logs or "loss" not in logs:
            return
        norms = self.adapter.norms()
        plan = self.adapter.plan
        share = plan.trainable_parameters / (plan.total_parameters + plan.adapter_parameters)
        added = {"adapter_norm": norms["mean"], "adapter_norm_max": norms["max"], "trainable_share": share}
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the adapter over what Trainer wrote: as one act, with a digest. Only the main process writes."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir() and not self.adapter.merged:
            self.adapter.save(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Merge, if asked."""
        if self.merge_at_end and not self.adapter.merged:
            self.adapter.merge()
