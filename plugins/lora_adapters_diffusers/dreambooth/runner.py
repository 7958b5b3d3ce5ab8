"""The task dreambooth: what `lora-adapters train`, `plan`, `eval`, `generate` and `LoraPipeline.dreambooth` ask of it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

import lora_adapters as la
from lora_adapters.device import pick_device
from lora_adapters.errors import RequestError
from lora_adapters.memory import StepMemory
from lora_adapters.report.facts import DataFacts, Sample
from lora_adapters.runs.beginning import record_adapter, record_data, record_memory
from lora_adapters.runs.gradients import GradientGuard
from lora_adapters.runs.keeping import raise_unless_finished, save_adapter
from lora_adapters.runs.loop import TrainingLoop
from lora_adapters.runs.measuring import Measured, evaluating
from lora_adapters.runs.optimizers import make_optimizer, parameter_groups
from lora_adapters.runs.processes import own_device
from lora_adapters.runs.progress import Progress
from lora_adapters.runs.random_state import seed_all
from lora_adapters.runs.recipe_runner import RecipeRunner
from lora_adapters.runs.requirements import check_training, compute_dtype
from lora_adapters.runs.runner import Run

from ..pipeline import LoraPipeline
from . import base_pipeline
from .adapters import (
    PipelinePlan,
    check_adapter,
    check_file_can_hold,
    combined,
    denoiser_arguments,
    encoder_arguments,
    encoders_to_train,
)
from .families import family_of
from .images import hold_out, read_evaluation, read_subject
from .memory import step_memory
from .objective import objective_of
from .sampling import Sampler, column, write_images
from .session import Session, batches_for, task_for

if TYPE_CHECKING:
    from ..recipes import DreamBoothRecipe
    from .family import Family
    from .items import Item

_ON_TRAINING = "There are no eval images (data.eval, data.eval_fraction): the loss was measured on the training images."


class DreamBoothRunner(RecipeRunner):
    """See `lora_adapters.runs.runner.Runner`.

    Args:
        recipe: the validated recipe.
        lora: a pipeline in memory, which gets the adapter; None loads the one that the recipe names.
        images: images in memory, in the place of those that the recipe names.
        adapter_name: name of the adapter on the pipeline.
    """

    several_processes = True
    rows = "images"

    def __init__(
        self,
        recipe: DreamBoothRecipe,
        lora: LoraPipeline | None = None,
        images: Sequence[Image.Image] | None = None,
        adapter_name: str = "default",
    ) -> None:
        super().__init__(recipe)
        self.lora, self.given_images, self.adapter_name = lora, images, adapter_name
        self.train_items: list[Item] = []
        self.eval_items: list[Item] = []

    # ---- before a weight is read -------------------------------------------------------------------------------------

    @cached_property
    def device(self) -> torch.device:
        """Where the pipeline goes."""
        return own_device(pick_device(self.recipe.model.device))

    @cached_property
    def family(self) -> Family:
        """The pipeline to plan with: without its weights, if it is not in memory."""
        pipe = base_pipeline.skeleton(self.recipe.model) if self.lora is None else self.lora.pipe
        return self.family_of(pipe)

    def family_of(self, pipe: Any) -> Family:
        """Return a pipeline's family, told what the recipe says."""
        guidance = self.recipe.diffusion.guidance
        return family_of(pipe, None if guidance == type(self.recipe.diffusion)().guidance else guidance)

    @cached_property
    def encoders(self) -> list[str]:
        """The text encoders that get an adapter."""
        loadable = self.family.pipe._lora_loadable_modules
        return encoders_to_train(
            self.recipe.adapter, [name for name in self.family.text_encoder_names if name in loadable]
        )

    @cached_property
    def cuda_graphs(self) -> bool:
        """Whether steps run as CUDA graphs."""
        training, section = self.recipe.training, self.recipe.adapter
        hindrances = {
            f"the device is {self.device.type}": self.device.type != "cuda",
            "text encoders, which read the prompt on the CPU, are trained (adapter.text_encoders)": bool(self.encoders),
            "what dropout leaves out can't be drawn again by gradient_checkpointing": bool(
                section.dropout and training.gradient_checkpointing
            ),
        }
        found = [why for why, holds in hindrances.items() if holds]
        if found and training.cuda_graphs is True:
            raise RequestError(
                f"training.cuda_graphs can't be true: {'; '.join(found)}. Leave it out, or set it to false."
            )
        return not found and training.cuda_graphs is not False

    def check(self, parts: Sequence[str] = ("train", "eval")) -> None:
        """Find what is wrong with the recipe, read the images, and plan the adapter; no weight is read."""
        recipe = self.recipe
        _ = self.device, self.autocast
        check_training(recipe.training)
        self.optimizer(
            {name: nn.ParameterList([torch.zeros(1)]) for name in (self.family.denoiser_name, *self.encoders)}
        )
        objective_of(self.family.pipe, recipe.diffusion)
        self._read(parts)
        if "train" in parts:
            check_adapter(recipe.adapter)
            _ = self.cuda_graphs
            check_file_can_hold(self.made_plan)
            batches_for(self, self.train_items)
            self._check_samples()
        batches_for(self, self.eval_items, still=True)

    def _read(self, parts: Sequence[str]) -> None:
        """Set `train_items` and `eval_items`; without eval images these are those of training."""
        data = self.recipe.data
        held_out = read_evaluation(data)
        if "train" in parts or not held_out:
            self.train_items = read_subject(data, self.given_images)
        if data.eval_fraction:
            self.train_items, held_out = hold_out(self.train_items, data.eval_fraction, self.recipe.training.seed)
        self.eval_items = held_out or self.train_items

    def _check_samples(self) -> None:
        section, multiple = self.recipe.samples, self.family.pipe.vae_scale_factor
        for name in ("height", "width"):
            side = getattr(section, name)
            if side is not None and side % multiple:
                raise RequestError(
                    f"samples.{name}: this pipeline makes images whose sides are multiples of {multiple}."
                )
        if section.prompts == []:
            raise RequestError("samples.prompts: give a prompt, or samples.count=0 for no images.")

    def shape(self) -> tuple[int, int]:
        """Return the images of one forward pass, those of the class included; they have no tokens."""
        return self.recipe.training.batch_size * (1 if self.recipe.prior is None else 2), 1

    def plan(self, quantization: Any) -> PipelinePlan:
        """Return the recipe's plan for a base stored as `quantization` says."""
        family = self.family
        stored = base_pipeline.quantization_of(quantization, family.denoiser_name, family.text_encoder_names)
        asked = self.arguments(family.pipe)
        parts = {
            name: la.plan(getattr(family.pipe, name), **given, quantization=stored.get(name))
            for name, given in asked.items()
        }
        return combined(parts)

    def arguments(self, pipe: Any) -> dict[str, dict[str, Any]]:
        """Return component -> what `attach` takes for it, the denoiser first."""
        section, denoiser = self.recipe.adapter, self.family.denoiser_name
        found = {denoiser: denoiser_arguments(section, getattr(pipe, denoiser))}
        return found | {name: encoder_arguments(section) for name in self.encoders}

    def memory(
        self, plan: PipelinePlan, batch_size: int, length: int, checkpointing: bool, device: str | None = None
    ) -> StepMemory:
        """Predict a step; see `Runner.memory`."""
        there = torch.device(device or self.device.type)
        autocast = compute_dtype(self.recipe.training, there)
        return step_memory(self.family, plan, self.recipe, batch_size, checkpointing, there.type, autocast)

    def optimizer(self, models: Mapping[str, nn.Module]) -> torch.optim.Optimizer:
        """Return the recipe's optimizer of component -> model; text encoders may have a learning rate of their own."""
        training = self.recipe.training
        rate = training.learning_rate
        rates = dict.fromkeys(models, training.text_learning_rate or rate) | {self.family.denoiser_name: rate}
        groups = parameter_groups(models, rates, training.lora_plus)
        return make_optimizer(training, groups, **training.optimizer_options)

    @property
    def prompts(self) -> list[str]:
        """What images are made of while training."""
        section, prior = self.recipe.samples, self.recipe.prior
        if section.prompts is not None:
            return section.prompts
        subject = self.train_items[0].caption if self.recipe.data.prompt is None else self.recipe.data.prompt
        return [subject] if prior is None else [subject, prior.prompt]

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, run: Run) -> None:
        """Train; see `Runner.train`. A pipeline in memory carries the adapter afterwards; an error leaves it as it was."""
        record_data(run, self._data_facts())
        if self.eval_items is self.train_items and _ON_TRAINING not in run.facts.notes:
            run.facts.notes.append(_ON_TRAINING)
        session = None
        try:
            with run.preparing():
                record_memory(run, self, self.made_plan, self.device)
                session = Session(self, run, self.lora or LoraPipeline(self.load(run.progress)))
                record_adapter(run, session.adapters)
                session.look_before()
            self._fit(run, session)
        except BaseException:
            if session is not None:
                session.undo()
            raise
        session.close()

    def _fit(self, run: Run, session: Session) -> None:
        guard = GradientGuard(run)
        loop = TrainingLoop(run, session.adapters, guard, session.parts())
        with session.family.attention():
            loop.fit()
        with loop.averaged():
            save_adapter(run, session.adapters, guard)
            raise_unless_finished(run, guard)
            with run.measuring():
                session.look_after()
        if self.recipe.training.ema:  # what was saved is what the pipeline carries
            session.adapters.take_values(run.folder.adapter)

    def _data_facts(self) -> list[DataFacts]:
        data, prior = self.recipe.data, self.recipe.prior
        images = data.images if isinstance(data.images, str) else ", ".join(data.images)
        sizes = {f"{w} x {h}": n for (h, w), n in batches_for(self, self.train_items).counts.items()}
        details = {"sizes": ", ".join(f"{n} of {size}" for size, n in sizes.items())}
        found = [DataFacts("train", images, len(self.train_items), details)]
        named = data.eval if isinstance(data.eval, str) else ", ".join(data.eval or [images])
        found.append(DataFacts("eval", named, len(self.eval_items)))
        if prior is not None:
            found.append(DataFacts("class", prior.folder or prior.prompt, prior.images))
        return found

    def load(self, progress: Progress) -> Any:
        """Return the base pipeline on its device, stored as the recipe says."""
        section = self.recipe.model
        progress.say(f"loading {section.name}")
        family = self.family
        stored = base_pipeline.quantization_of(section.quantization, family.denoiser_name, family.text_encoder_names)
        pipe = base_pipeline.load(section, stored)
        seed_all(self.recipe.training.seed)
        return pipe.to(self.device)

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @property
    def eval_count(self) -> int:
        """Return the number of eval images."""
        return len(self.eval_items)

    def measure_eval(self, model: Family) -> Measured:
        """Return the loss of a pipeline on the eval images."""
        task = task_for(self, model, batches_for(self, self.eval_items, still=True), trained=False)
        with evaluating(model.models(), self.autocast):
            return Measured({"loss": task.measure()})

    def generate(
        self, adapters: Mapping[str, Path], prompts: Sequence[str], progress: Progress, **options: Any
    ) -> list[Sample]:
        """Return the images that the base and each adapter make of prompts, as files in a new folder; see `Runner`."""
        section = self.recipe.samples.model_copy(
            update={"seed": options.get("seed", 0), "count": max(1, self.recipe.samples.count)}
        )
        folder = Path(tempfile.mkdtemp(prefix="lora-adapters-"))
        found = [Sample(prompt) for prompt in prompts]
        for name, family in self.each(adapters, progress):
            made = Sampler(family, section, prompts, self.recipe.data.resolution or family.resolution).images()
            for number, (sample, images) in enumerate(zip(found, made, strict=True), 1):
                paths = write_images(folder, f"prompt-{number}-{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}", images)
                sample.parts.append((name, " ".join(map(str, paths))))
                sample.images.append((name, column(images)))
        return found

    def each(self, adapters: Mapping[str, Path], progress: Progress) -> Iterator[tuple[str, Family]]:
        """Yield ("base", the pipeline), then (name, the same pipeline with that adapter)."""
        lora = LoraPipeline(self.load(progress))
        family = self.family_of(lora.pipe)
        yield "base", family
        for name, path in adapters.items():
            lora.load(path)
            yield name, family
            lora.delete("default")
