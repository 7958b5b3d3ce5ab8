"""What the text tasks share: data, tokenizer, model, adapter, Trainer, in the order in which a run needs them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

import lora_adapters as la
from lora_adapters.api import skeleton
from lora_adapters.attach_plan import AttachPlan
from lora_adapters.budget import format_size
from lora_adapters.device import pick_device
from lora_adapters.errors import LoraAdaptersError, RequestError, UnsupportedError
from lora_adapters.free_memory import free_memory
from lora_adapters.inject import fallbacks
from lora_adapters.memory import StepMemory
from lora_adapters.recipes.sections import AdapterSection
from lora_adapters.report.facts import Sample
from lora_adapters.report.plan_groups import adapted, skipped
from lora_adapters.runs import checkpoints
from lora_adapters.runs.folder import LOGS
from lora_adapters.runs.measured import PeakMemory
from lora_adapters.runs.progress import Progress
from lora_adapters.runs.runner import DivergedError, Run

from ..callback import LoraCallback
from ..data.encoding import Encoded
from ..loading import read_config
from .arguments import check_start, check_training, compute_dtype, training_arguments
from .callback import Counter, RunCallback
from .measures import Collate, Measured
from .positions import limits

#: A recipe's name of an adapter setting -> `attach`'s, where they differ.
_PEFT_NAMES = {"init": "init_lora_weights", "dora": "use_dora", "rslora": "use_rslora"}


class Measuring:
    """Mixed into a Trainer: `evaluate` measures as everywhere else in a run."""

    measure: Any = None

    def evaluate(self: Any, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Return the task's metrics of the model as it is now."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure().metrics.items()}
        training = self.model.training
        self.model.eval()  # TRL's trainers tell by this whose metrics they log
        self.log(dict(metrics))
        self.model.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class PlainTrainer(Measuring, Trainer):
    """transformers' Trainer with a task's own measure."""


class TextRunner:
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
        self.recipe = recipe
        self.train_rows: Encoded | None = None
        self.eval_rows: Encoded | None = None

    # ---- what a task says --------------------------------------------------------------------------------------------

    def encode_data(self, parts: Sequence[str]) -> None:
        """Read the data, check its columns and set `train_rows` and `eval_rows`; `parts` of "train", "eval" are needed."""
        raise NotImplementedError

    def model_options(self) -> dict[str, Any]:
        """Return what `lora_adapters.load` needs besides the name."""
        return {"task": self.task}

    def collator(self, training: bool) -> Collate:
        """Return what makes a batch of rows."""
        raise NotImplementedError

    def measure(self, model: Any, rows: Any) -> Measured:
        """Return the metrics of a model."""
        raise NotImplementedError

    def samples(self, model: Any, count: int, measured: Measured | None) -> list[list[tuple[str, str]]]:
        """Return for each of the first eval rows (label, text) pairs: what it is, then what the model makes of it."""
        raise NotImplementedError

    def preview(self, progress: Progress) -> None:
        """Show one row as the model sees it."""

    # ---- before training ---------------------------------------------------------------------------------------------

    @cached_property
    def device(self) -> torch.device:
        """Where the model goes."""
        return pick_device(self.recipe.model.device)

    @cached_property
    def autocast(self) -> torch.dtype | None:
        """Dtype of the computation, None for the weights' own."""
        return compute_dtype(self.recipe.training, self.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer; a missing pad token is its end token, which masks and labels keep apart."""
        model = self.recipe.model
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise LoraAdaptersError(f"model.name: {model.name!r} has no tokenizer that loads: {first}") from error
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise UnsupportedError(
                    f"model.name: the tokenizer of {model.name!r} has neither a pad token nor an end token. Name one of its "
                    'tokens as "eos_token" in its tokenizer_config.json.'
                )
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def check(self, parts: Sequence[str] = ("train", "eval")) -> None:
        """Read and encode the data, look the model up, and plan the adapter; no weight is read."""
        data = self.recipe.data
        if "train" not in parts and data.eval is None and data.eval_split is None and not data.eval_fraction:
            raise RequestError("There is no eval data: give --data FILE, or data.eval=FILE.")
        check_training(self.recipe.training)
        self._look_up()
        if "train" in parts:
            check_start(self.recipe.adapter, self.recipe.model.quantization)
        self._check_lengths()
        self.encode_data(parts)
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

    def accept(self, adapters: Mapping[str, Path]) -> None:
        """Take what the recipe leaves open; see `Runner.accept`."""

    @cached_property
    def made_plan(self) -> AttachPlan:
        """The recipe's plan, on the model without its weights."""
        return self.plan(self.recipe.model.quantization)

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
        return la.plan(base, **self.attach_arguments(), quantization=quantization)

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

    def attach_arguments(self) -> dict[str, Any]:
        """Return the recipe's adapter section as `attach` takes it; what was left out is left to `attach`."""
        section: AdapterSection = self.recipe.adapter
        given = {name: getattr(section, name) for name in type(section).model_fields}
        plain = {name: f.default for name, f in type(section).model_fields.items()}
        return {
            _PEFT_NAMES.get(name, name): value
            for name, value in given.items()
            if value != plain[name] or name in ("rank", "targets")
        }

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, run: Run) -> None:
        """Train; see `Runner.train`."""
        facts, say = run.facts, run.progress.say
        assert self.train_rows is not None
        data = [encoded.facts for encoded in (self.train_rows, self.eval_rows) if encoded is not None]
        if run.resume_from is not None and facts.data and facts.data != data:
            raise RequestError(
                "resume=true, but the data is not what the run began with: a resumed run must go on as it began. Put the "
                "files back, or give another output."
            )
        facts.data = data
        for part in facts.data:
            say(
                f"{part.name}: {part.rows:,} rows of {part.source}" + "".join(_detail(*d) for d in part.details.items())
            )
        if run.resume_from is None:
            self.preview(run.progress)
        facts.higher_is_better, facts.labels = list(self.higher_is_better), self.train_rows.label_names
        with run.stop.at_once("Nothing was trained yet."):
            self._predict(run)
            say(f"loading {self.recipe.model.name}")
            set_seed(self.recipe.training.seed)
            model = self._load()
            # Here, so that a new head starts from the seed whatever loading drew.
            set_seed(self.recipe.training.seed)
            lora = LoraCallback(model, **self.attach_arguments())
            self._describe(run, lora)
            say(f"adapting {len(lora.adapter.plan.layers)} layers: {facts.trainable_parameters:,} values to train")
            self._check_model(lora.model)
            self._before(run, lora.model)
        self._fit(run, lora)

    def _load(self) -> Any:
        section = self.recipe.model
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
        return model

    def _check_model(self, model: Any) -> None:
        """Check what can only be seen on the model itself."""

    def _predict(self, run: Run) -> None:
        rows, length = self.shape()
        try:
            step = self.memory(self.made_plan, rows, length, self.recipe.training.gradient_checkpointing)
        except UnsupportedError as error:
            run.facts.notes.append(f"A step's memory was not predicted: {error}")
            return
        run.facts.memory_planned = {f.name: getattr(step, f.name) for f in fields(step)}
        free = free_memory(str(self.device))
        run.progress.say(
            f"a step of {rows} x {length} takes {format_size(step.total)} by the plan; {format_size(free)} are free on "
            f"{self.device}" + (": it may not fit (lora-adapters plan says what would)" if step.total > free else "")
        )

    def _describe(self, run: Run, lora: LoraCallback) -> None:
        plan, facts = lora.adapter.plan, run.facts
        facts.adapted, facts.skipped = adapted(plan, fallbacks(lora.adapter.base, plan)), skipped(plan)
        facts.trained = list(plan.trained)
        facts.notes += [note for note in plan.notes if note not in facts.notes]
        facts.trainable_parameters, facts.total_parameters = plan.trainable_parameters, plan.total_parameters

    def _before(self, run: Run, model: Any) -> None:
        """Measure the base, unless the run that is resumed has done so."""
        if self.eval_rows is None or run.facts.before:
            return
        run.progress.say(f"measuring the base on {len(self.eval_rows.rows):,} rows")
        measured = self.measure(model, self.eval_rows.rows)
        run.facts.before = measured.metrics
        count = min(self.recipe.samples, len(self.eval_rows.rows))
        before = self.samples(model, count, measured)
        run.facts.samples = [
            Sample(f"Eval row {i + 1}", [*parts[:-1], (f"{parts[-1][0]}, base", parts[-1][1])])
            for i, parts in enumerate(before)
        ]
        run.folder.write_facts(run.facts)

    def _fit(self, run: Run, lora: LoraCallback) -> None:
        assert self.train_rows is not None
        counter = Counter(self.collator(training=True))
        callback = RunCallback(run, counter, self.device)
        trainer = self._trainer(run, lora, counter, callback)
        memory = PeakMemory(self.device)
        resume = str(run.resume_from) if run.resume_from is not None else None
        trainer.train(resume_from_checkpoint=resume)
        facts = run.facts
        facts.memory_measured = memory.read()
        facts.steps, facts.epochs = trainer.state.global_step, float(trainer.state.epoch or 0)
        facts.throughput = callback.rates()
        run.progress.stop()
        self._save(run, lora, callback)
        if run.stop.requested is not None:
            saved = f"Step {facts.steps} of {facts.total_steps} and the adapter are saved in {run.folder.path}"
            raise run.stop.error(f"{saved}; the same command with resume=true goes on.")
        if callback.diverged:
            kept = (
                f"the adapter from before is in {run.folder.adapter}" if run.folder.adapter.exists() else "none is kept"
            )
            raise DivergedError(
                f"{callback.diverged} Training stopped at step {facts.steps}; {kept}. Try a lower training.learning_rate."
            )
        with run.stop.at_once(f"The adapter is trained and saved in {run.folder.adapter}; resume=true measures it."):
            self._after(run, lora.model)

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
            eval_rows = self.eval_rows.rows
            trainer.measure = lambda: self.measure(lora.model, eval_rows)
        return trainer

    def more_arguments(self) -> dict[str, Any]:
        """Return arguments of `arguments_class` besides those of every task."""
        return {}

    def _save(self, run: Run, lora: LoraCallback, callback: RunCallback) -> None:
        """Save the adapter if its values are finite, else the newest checkpoint's."""
        if all(bool(p.isfinite().all()) for p in lora.adapter.parameters()):
            lora.adapter.save(run.folder.adapter)
        elif (last := checkpoints.newest(run.folder.checkpoints)) is not None:
            # It was finite, or it could not have been trained on.
            restored = la.restore(lora.adapter.detach(), last)
            restored.save(run.folder.adapter)
        else:
            callback.diverged = callback.diverged or "The adapter's values are not finite."
            return
        self.tokenizer.save_pretrained(run.folder.adapter)
        run.facts.adapter_bytes = sum(p.stat().st_size for p in run.folder.adapter.glob("adapter_*"))

    def _after(self, run: Run, model: Any) -> None:
        if self.eval_rows is None:
            return
        run.progress.say("measuring the adapter")
        measured = self.measure(model, self.eval_rows.rows)
        run.facts.after, run.facts.tables = measured.metrics, measured.tables
        after = self.samples(model, len(run.facts.samples), measured)
        for sample, parts in zip(run.facts.samples, after, strict=True):
            sample.parts = [*sample.parts[: len(parts)], (f"{parts[-1][0]}, adapter", parts[-1][1])]

    # ---- saved adapters ----------------------------------------------------------------------------------------------

    def evaluate(self, adapters: Mapping[str, Path], progress: Progress) -> dict[str, dict[str, float]]:
        """Return name -> metrics on the eval data; see `Runner.evaluate`."""
        assert self.eval_rows is not None
        found: dict[str, dict[str, float]] = {}
        for name, model in self._each(adapters, progress):
            progress.say(f"measuring {name} on {len(self.eval_rows.rows):,} rows")
            found[name] = self.measure(model, self.eval_rows.rows).metrics
        return found

    def generate(
        self, adapters: Mapping[str, Path], prompts: Sequence[str], progress: Progress, **options: Any
    ) -> list[Sample]:
        """Return what the base and each adapter make of each prompt; see `Runner.generate`."""
        self._look_up()
        found = [Sample(prompt, []) for prompt in prompts]
        for name, model in self._each(adapters, progress):
            for sample in found:
                sample.parts.append((name, self.respond(model, sample.title, **options)))
        return found

    def respond(self, model: Any, prompt: str, **options: Any) -> str:
        """Return what a model makes of one prompt."""
        raise NotImplementedError

    def _each(self, adapters: Mapping[str, Path], progress: Progress):
        """Yield ("base", model), then (name, the same model with that adapter)."""
        progress.say(f"loading {self.recipe.model.name}")
        set_seed(self.recipe.training.seed)
        model = self._load()
        yield "base", model
        for name, path in adapters.items():
            adapter = la.restore(model, path)
            yield name, adapter.model
            adapter.detach()


def _detail(name: str, value: Any) -> str:
    return f", {value:,} {name}" if isinstance(value, int) else f", {name}: {value}"


def check_model(section: Any) -> None:
    """Raise unless the base model's config can be read: a folder that is not there is told with its nearest neighbour."""
    path = Path(section.name)
    looks_local = path.is_absolute() or section.name.startswith((".", "~")) or section.name.count("/") > 1
    if looks_local and not path.exists():
        raise RequestError(f"model.name: there is no folder {section.name!r}{_near(path)}")
    try:
        read_config(section.name, {}, {"revision": section.revision, "trust_remote_code": section.trust_remote_code})
    except LoraAdaptersError as error:
        known = [name for name in (*_folders_here(), *_cached_models()) if name != section.name]
        near = get_close_matches(section.name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RequestError(f"model.name: {error}{hint}") from error


def _near(path: Path) -> str:
    near = get_close_matches(path.name, [p.name for p in path.parent.glob("*") if p.is_dir()], n=1, cutoff=0.5)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ": give a folder, or a name on the Hub."


def _folders_here() -> list[str]:
    return [p.parent.name for p in Path().glob("*/config.json")]


def _cached_models() -> list[str]:
    """Return the names of models in the Hub's local cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return [p.name.removeprefix("models--").replace("--", "/") for p in Path(HF_HUB_CACHE).glob("models--*")]
