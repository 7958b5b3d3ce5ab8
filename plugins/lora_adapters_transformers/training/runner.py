"""What the text tasks share: data, tokenizer, model, adapter, Trainer, in the order in which a run needs them."""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import lora_adapters as la
from lora_adapters.api import skeleton
from lora_adapters.attach_plan import AttachPlan
from lora_adapters.error_text import first_line
from lora_adapters.errors import LoraAdaptersError, RequestError, UnsupportedError
from lora_adapters.memory import StepMemory
from lora_adapters.modes import modes_kept
from lora_adapters.recipes.adapting import attach_arguments, check_start
from lora_adapters.report.facts import Sample
from lora_adapters.runs.beginning import record_adapter, record_data, record_memory
from lora_adapters.runs.folder import LOGS
from lora_adapters.runs.gradients import GradientGuard
from lora_adapters.runs.keeping import raise_unless_finished, save_adapter
from lora_adapters.runs.measured import PeakMemory
from lora_adapters.runs.measuring import Measured
from lora_adapters.runs.progress import Progress
from lora_adapters.runs.random_state import seed_all
from lora_adapters.runs.recipe_runner import RowsRunner
from lora_adapters.runs.requirements import check_training, compute_dtype
from lora_adapters.runs.runner import Run
from lora_adapters.runs.showing import Rates, Steps

from ..callback import LoraCallback
from ..data.encoding import Encoded
from ..data.tables import read_data
from .arguments import training_arguments
from .base_model import check_model
from .callback import Counter, RunCallback
from .measures import Collate
from .positions import limits


class Measuring:
    """Mixed into a Trainer: `evaluate` measures as everywhere else in a run."""

    measure: Any = None

    def evaluate(self: Any, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Return the task's metrics of the model as it is now."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure().metrics.items()}
        with modes_kept(self.model):
            self.model.eval()  # TRL's trainers tell by this whose metrics they log
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class PlainTrainer(Measuring, Trainer):
    """transformers' Trainer with a task's own measure."""


class TextRunner(RowsRunner):
    """A text task; see `lora_adapters.runs.runner.Runner`. Each task says what differs.

    Args:
        recipe: the validated recipe.
    """

    #: `lora_adapters_transformers.loading.TASKS` key, which picks the model's class.
    task: ClassVar[str]
    higher_is_better: ClassVar[tuple[str, ...]]
    trainer_class: ClassVar[type] = PlainTrainer
    arguments_class: ClassVar[type] = TrainingArguments

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipe)
        self.train_rows: Encoded | None = None
        self.eval_rows: Encoded | None = None

    # ---- what a task says --------------------------------------------------------------------------------------------

    @abstractmethod
    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise unless the recipe's data can be taken from rows with these columns."""

    @abstractmethod
    def encode(self, rows: datasets.Dataset, name: str) -> Encoded:
        """Return rows as token ids and labels; `name` is "train" or "eval", in this order."""

    def model_options(self) -> dict[str, Any]:
        """Return what `lora_adapters.load` needs besides the name."""
        return {"task": self.task}

    @abstractmethod
    def collator(self, training: bool) -> Collate:
        """Return what makes a batch of rows."""

    @abstractmethod
    def measure(self, model: Any, rows: Any) -> Measured:
        """Return the metrics of a model."""

    @abstractmethod
    def samples(self, model: Any, count: int, measured: Measured | None) -> list[list[tuple[str, str]]]:
        """Return for each of the first eval rows (label, text) pairs: what it is, then what the model makes of it."""

    @abstractmethod
    def preview(self, progress: Progress) -> None:
        """Show one row as the model sees it."""

    @abstractmethod
    def respond(self, model: Any, prompt: str, **options: Any) -> str:
        """Return what a model makes of one prompt."""

    def more_arguments(self) -> dict[str, Any]:
        """Return arguments of `arguments_class` besides those of every task."""
        return {}

    # ---- before training ---------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer; a missing pad token is its end token, which masks and labels keep apart."""
        model = self.recipe.model
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise LoraAdaptersError(
                f"model.name: {model.name!r} has no tokenizer that loads: {first_line(error)}"
            ) from error
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise UnsupportedError(
                    f"model.name: the tokenizer of {model.name!r} has neither a pad token nor an end token. Name one of its "
                    'tokens as "eos_token" in its tokenizer_config.json.'
                )
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def padder(self) -> PreTrainedTokenizerBase:
        """The tokenizer for collators. It pads on the right, whatever the checkpoint says for generation: learnt positions
        begin at the first token then, and no pad token predicts one.
        """
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.padding_side = "right"
        return tokenizer

    def check(self, parts: Sequence[str] = ("train", "eval")) -> None:
        """Read and encode the data, look the model up, and plan the adapter; no weight is read."""
        self.check_eval(parts, "FILE")
        check_training(self.recipe.training)
        self._look_up()
        if "train" in parts:
            check_start(self.recipe.adapter, self.recipe.model.quantization)
        self._check_lengths()
        self._encode_data(parts)
        if "train" in parts:
            _ = self.made_plan

    def _look_up(self) -> None:
        """Check device and model, and keep the libraries quiet."""
        _ = self.device, self.autocast
        check_model(self.recipe.model)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()

    def _check_lengths(self) -> None:
        """Refuse rows longer than the model has positions for; a length that nobody gave is lowered to that."""
        training = self.recipe.training
        for key, limit in zip(("max_length", "max_target_length"), limits(self._skeleton(task=self.task)), strict=True):
            asked = getattr(training, key, None)
            if limit is None or asked is None or asked <= limit:
                continue
            if key in training.model_fields_set:
                raise RequestError(
                    f"training.{key} is {asked}, and {self.recipe.model.name} has positions for {limit} tokens only: set "
                    f"training.{key}={limit}, or take a model for longer texts."
                )
            setattr(training, key, limit)

    def _encode_data(self, parts: Sequence[str]) -> None:
        """Read the data, check its columns and set `train_rows` and `eval_rows`; `parts` of "train", "eval" are needed."""
        train, held_out = read_data(self.recipe.data, self.recipe.training.seed)
        for rows in (train, held_out):
            if rows is not None:
                self.check_columns(rows.column_names)
        if "train" in parts:
            self.train_rows = self.encode(train, "train")
        if held_out is not None:
            self.eval_rows = self.encode(held_out, "eval")

    def shape(self) -> tuple[int, int]:
        """Return rows and tokens of one forward pass."""
        training = self.recipe.training
        longest = training.max_length
        if self.train_rows is not None and not getattr(training, "packing", False):
            longest = min(longest, max(len(ids) for ids in self.train_rows.rows["input_ids"]))
        return training.batch_size, longest

    def plan(self, quantization: Any) -> AttachPlan:
        """Return the recipe's plan for a base stored as `quantization` says."""
        base = self._skeleton(**self.model_options())
        return la.plan(base, **attach_arguments(self.recipe.adapter), quantization=quantization)

    def _skeleton(self, **options: Any) -> Any:
        model = self.recipe.model
        source = {"dtype": model.dtype, "revision": model.revision, "trust_remote_code": model.trust_remote_code}
        return skeleton(model.name, backend="transformers", **source, **options)

    def memory(
        self, plan: AttachPlan, batch_size: int, length: int, checkpointing: bool, device: str | None = None
    ) -> StepMemory:
        """Predict a step; see `Runner.memory`."""
        training, there = self.recipe.training, torch.device(device or self.device.type)
        return plan.memory(
            batch_size,
            length,
            optimizer=training.optimizer,
            autocast=compute_dtype(training, there),
            device=there.type,
            checkpointing=checkpointing or None,
        )

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, run: Run) -> None:
        """Train; see `Runner.train`."""
        facts = run.facts
        assert self.train_rows is not None
        data = [encoded.facts for encoded in (self.train_rows, self.eval_rows) if encoded is not None]
        record_data(run, data)
        if run.resume_from is None:
            self.preview(run.progress)
        facts.higher_is_better, facts.labels = list(self.higher_is_better), self.train_rows.label_names
        with run.preparing():
            record_memory(run, self, self.made_plan, self.device)
            lora = LoraCallback(self.load(run.progress), **attach_arguments(self.recipe.adapter))
            record_adapter(run, lora.adapter)
            self._check_model(lora.model)
            self.measure_base(run, lora.model)
        self._fit(run, lora)

    def load(self, progress: Progress) -> Any:
        """Return the base; see `RecipeRunner.load`."""
        section, seed = self.recipe.model, self.recipe.training.seed
        progress.say(f"loading {section.name}")
        seed_all(seed)
        model = la.load(
            section.name,
            backend="transformers",
            plan=self.made_plan,
            dtype=section.dtype,
            device=section.device,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            **self.model_options(),
        )
        text: Any = model.config
        if text.pad_token_id is None:
            text.pad_token_id = self.tokenizer.pad_token_id
        seed_all(seed)  # A starts from the seed, whatever loading drew for a new head
        return model

    def _check_model(self, model: Any) -> None:
        """Check what can only be seen on the model itself."""

    def _fit(self, run: Run, lora: LoraCallback) -> None:
        assert self.train_rows is not None
        steps = Steps(run, self.device, Rates("tokens", "rows"))
        counter = Counter(self.collator(training=True), steps.rates)
        guard = GradientGuard(run)
        trainer = self._trainer(run, lora, counter, RunCallback(run, steps, guard))
        memory = PeakMemory(self.device)
        resume = str(run.resume_from) if run.resume_from is not None else None
        trainer.train(resume_from_checkpoint=resume)
        facts = run.facts
        facts.memory_measured = memory.read()
        facts.steps, facts.epochs = trainer.state.global_step, float(trainer.state.epoch or 0)
        facts.throughput = steps.rates.read()
        run.progress.stop()
        if save_adapter(run, lora.adapter, guard):
            self.tokenizer.save_pretrained(run.folder.adapter)
        raise_unless_finished(run, guard)
        with run.measuring():
            self.measure_adapter(run, lora.model)

    def _trainer(self, run: Run, lora: LoraCallback, counter: Counter, callback: RunCallback) -> Any:
        assert self.train_rows is not None
        rows = self.train_rows.rows
        settings = training_arguments(
            self.recipe.training, run.folder.checkpoints, len(rows), self.eval_rows is not None, self.device
        )
        # What Trainer's reporting reads; a folder that the user named for W&B stays.
        logs = run.folder.path / LOGS
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)
        if "wandb" in self.recipe.training.report_to and "WANDB_DIR" not in os.environ:
            logs.mkdir(exist_ok=True)
            os.environ["WANDB_DIR"] = str(logs)
        arguments = self.arguments_class(**settings, **self.more_arguments(), run_name=run.folder.path.name)
        if self.device.type == "cuda":
            if arguments.device.index not in (None, self.device.index or 0):
                raise RequestError(
                    f"Trainer uses {arguments.device}: to train on {self.device}, set CUDA_VISIBLE_DEVICES="
                    f"{self.device.index} and model.device=cuda."
                )
            arguments._n_gpu = 1  # one process trains on one device; several are torchrun's business
        trainer = self.trainer_class(
            model=lora.model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=self.eval_rows.rows if self.eval_rows is not None else None,
            data_collator=counter,
            processing_class=self.tokenizer,
            callbacks=[lora, callback],
        )
        trainer.remove_callback(PrinterCallback)
        if self.eval_rows is not None:
            trainer.measure = lambda: self.measure_eval(lora.model)
        return trainer

    # ---- measuring, and saved adapters -------------------------------------------------------------------------------

    @property
    def eval_count(self) -> int:
        """Return the number of eval rows."""
        return 0 if self.eval_rows is None else len(self.eval_rows.rows)

    def measure_eval(self, model: Any) -> Measured:
        """Return the metrics of a model on the eval rows."""
        assert self.eval_rows is not None
        return self.measure(model, self.eval_rows.rows)

    def show_eval(self, model: Any, measured: Measured, count: int) -> list[Sample]:
        """Return the first eval rows; see `samples`."""
        found = self.samples(model, count, measured)
        return [Sample(f"Eval row {i + 1}", parts) for i, parts in enumerate(found)]

    def generate(
        self, adapters: Mapping[str, Path], prompts: Sequence[str], progress: Progress, **options: Any
    ) -> list[Sample]:
        """Return what the base and each adapter make of each prompt; see `Runner.generate`."""
        self._look_up()
        found = [Sample(prompt, []) for prompt in prompts]
        for name, model in self.each(adapters, progress):
            for sample in found:
                sample.parts.append((name, self.respond(model, sample.title, **options)))
        return found
