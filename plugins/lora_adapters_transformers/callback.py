"""LoRA for transformers' Trainer, as a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from accelerate.utils import extract_model_from_parallel
from packaging.version import Version
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import lora_adapters
from lora_adapters.errors import StateError

#: Where a checkpoint holds several adapters, Trainer then resumes those in subfolders only. PEFT keeps "default" above
#: them, so its training would start anew, and nothing would say so.
_RESUMES_SUBFOLDERS_ONLY = Version(transformers.__version__) < Version("5.23")


class LoraCallback(TrainerCallback):
    """Attaches a LoRA adapter when constructed, and looks after it while Trainer trains.

        lora = LoraCallback(model, rank=16, quantization="nf4")
        trainer = Trainer(model=lora.model, args=args, train_dataset=data, callbacks=[lora])
        trainer.train()

    At each log it adds `adapter_norm` (mean Frobenius norm of scaling * B @ A over the layers), `adapter_norm_max` and
    `trainable_share` (trained values / all values, 0 to 1) to `trainer.state.log_history` and to what is printed. The
    reporting integrations of `report_to` run before any callback of the user and don't get them.

    At each save it writes the adapter (never the base) over Trainer's copy, as one act with a digest. Under FSDP and
    DeepSpeed, where no process holds the whole weights, Trainer's own copy stands. Resuming, `load_best_model_at_end`,
    evaluation and `push_to_hub` are Trainer's own and work, because `lora.model` is a PeftModel.
    With gradient checkpointing it makes the embeddings' output require a gradient, which `use_reentrant=True` needs.

    TRL's trainers work as Trainer does. They cast the adapter of a quantized base to bfloat16, where most small updates
    round to nothing; the callback casts it back to the dtype it was attached with. GRPO with beta > 0 wants the
    adapter name "default" and puts a frozen copy named "ref" beside it, which checkpoints keep in a subfolder of that
    name. `lora.model.delete_adapter("ref")` drops the copy.

    Args:
        model: a transformers model, dense or already quantized. A dense one is quantized here, before Trainer moves it.
        rank: rank of A and B; None takes that of `config`, else 16.
        merge_at_end: fold the adapter into the base after training (after the best checkpoint was loaded), so that
            the model predicts at the base's speed. What is saved, before and after, still is the adapter alone:
            `trainer.save_model()` writes it, and so does `lora.adapter.save` after `lora.adapter.unmerge()`. For a
            plain model call `lora.adapter.merge(unload=True)`. Training again unmerges first.
        **attach_arguments: everything else `lora_adapters.attach` takes: alpha, targets, dropout, quantization, ...

    Raises:
        StateError: `model` instead of `lora.model` was given to Trainer, `model_init` was used, or the callback came
            through `add_callback` after Trainer was constructed; or reentrant checkpointing in several processes lacks
            `ddp_find_unused_parameters=False`. A quantized bare model is refused by Trainer itself, with a ValueError
            that asks for adapters: give it `lora.model`.
    """

    def __init__(
        self, model: nn.Module, rank: int | None = None, *, merge_at_end: bool = False, **attach_arguments: Any
    ) -> None:
        if rank is not None:
            attach_arguments["rank"] = rank
        self.adapter = lora_adapters.attach(model, **attach_arguments)
        self.merge_at_end = merge_at_end
        self._constructed_with_trainer = False
        self._dtypes = [(parameter, parameter.dtype) for parameter in self.adapter.parameters()]

    @property
    def model(self) -> nn.Module:
        """Return the PeftModel to give to Trainer."""
        return self.adapter.model

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that Trainer got the adapted model and settings that can work; undo TRL's cast."""
        self._check_model(kwargs.get("model"))
        _check_checkpointing(args)
        self._constructed_with_trainer = True
        if not args.fsdp:  # FSDP wants one dtype everywhere.
            self._undo_cast()

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
        if self.adapter.merged:
            self.adapter.unmerge()
        if args.gradient_checkpointing:
            self._let_gradients_in()

    def _check_model(self, given: Any) -> None:
        # FSDP and torch.compile wrap the model; what Trainer trains is still the one inside.
        given = extract_model_from_parallel(given, keep_torch_compile=False) if given is not None else None
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

    def _undo_cast(self) -> None:
        """Give the adapter of a bitsandbytes base its dtype back: TRL casts it to bfloat16 for those bases only."""
        base = self.adapter.base
        if not (getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)):
            return
        for parameter, dtype in self._dtypes:
            parameter.data = parameter.data.to(dtype)

    def _let_gradients_in(self) -> None:
        """Make the embeddings' output require a gradient: a reentrant checkpoint whose inputs need none computes none.

        Trainer does this for adapters of transformers' own integration only (transformers#42489).
        """
        base = self.adapter.base
        if not getattr(base, "_require_grads_hooks", None) and not getattr(base, "_require_grads_hook", None):
            base.enable_input_require_grads()  # type: ignore[operator]

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
        """Write the adapter over what Trainer wrote. Only the process that Trainer lets save does so."""
        if not args.should_save or args.fsdp or args.deepspeed:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.adapter.save(folder)
        if _RESUMES_SUBFOLDERS_ONLY and len(self.adapter.model.peft_config) > 1:
            self.adapter.save(folder / self.adapter.name)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Merge, if asked."""
        if self.merge_at_end:
            self.adapter.merge()


def _check_checkpointing(args: TrainingArguments) -> None:
    """Refuse what DistributedDataParallel answers with "Expected to mark a variable ready only once"."""
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    distributed = args.world_size > 1 and not args.fsdp and not args.deepspeed
    if reentrant and distributed and args.ddp_find_unused_parameters is not False:
        raise StateError(
            "In several processes, reentrant gradient checkpointing fails in the first backward pass, because Trainer "
            "looks for unused parameters of a PeftModel. Set ddp_find_unused_parameters=False, or "
            'gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )
