"""One training of a pipeline: what is made before the first step, what is looked at, and how the pipeline is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_adapters.cache_folder import cache_folder
from lora_adapters.errors import RequestError
from lora_adapters.modes import modes_kept
from lora_adapters.runs import processes
from lora_adapters.runs.checkpoints import step_of
from lora_adapters.runs.loop import Parts
from lora_adapters.runs.measuring import evaluating
from lora_adapters.runs.optimizers import Schedule
from lora_adapters.runs.random_state import seed_all
from lora_adapters.runs.schedule import steps_of, total_steps

from .adapters import Adapters
from .batches import Batches, unchanging
from .caches import CachedLatents, CachedText
from .memory import set_checkpointing, stop_checkpointing
from .objective import objective_of
from .prior import class_images
from .put_away import PutAway
from .sampling import Sampler, forget_after
from .task import Task

if TYPE_CHECKING:
    from lora_adapters.runs.runner import Run

    from ..pipeline import LoraPipeline
    from .family import Family
    from .items import Item
    from .runner import DreamBoothRunner


def batches_for(
    runner: DreamBoothRunner, items: Sequence[Item], prior: Sequence[Item] = (), still: bool = False
) -> Batches:
    """Return the batches of images.

    Args:
        runner: has the recipe and the family.
        items: images of the subject.
        prior: images of the class.
        still: nothing is random: for images that the loss is measured on.
    """
    recipe, family = runner.recipe, runner.family
    return Batches(
        items,
        unchanging(recipe.data) if still else recipe.data,
        batch_size=recipe.training.batch_size,
        seed=recipe.training.seed,
        resolution=family.resolution,
        multiple=family.multiple,
        prior=prior,
    )


def task_for(
    runner: DreamBoothRunner,
    family: Family,
    batches: Batches,
    trained: bool,
    latents: CachedLatents | None = None,
    text: CachedText | None = None,
) -> Task:
    """Return what the loop asks, of images in batches; `trained` says whether gradients flow to text encoders."""
    recipe = runner.recipe
    return Task(
        family,
        objective_of(family.pipe, recipe.diffusion),
        batches,
        latents=latents,
        text=text,
        trained=trained,
        prior_weight=1.0 if recipe.prior is None else recipe.prior.weight,
        seed=recipe.training.seed,
        workers=recipe.data.workers,
    )


class Session:
    """A pipeline with a new adapter, ready to train.

    Args:
        runner: has the recipe, the images and the plan.
        run: the run; its checkpoint, if there is one, gives the adapter its values.
        lora: the pipeline, on its device.

    Attributes:
        adapters: what is trained.
    """

    def __init__(self, runner: DreamBoothRunner, run: Run, lora: LoraPipeline) -> None:
        self.runner, self.run, self.lora = runner, run, lora
        self.recipe, self.family = runner.recipe, runner.family_of(lora.pipe)
        self.scheduler = lora.pipe.scheduler
        self._modes = ExitStack()
        self._modes.enter_context(modes_kept(*self._models()))
        self._compiled: nn.Module | None = None
        self.away = PutAway(lora.pipe, self._not_needed())
        class_ = self._class_images()
        self.adapters = self._attach()
        try:
            self._prepare(class_)
        except BaseException:
            self.undo()
            raise

    def _models(self) -> list[nn.Module]:
        return [part for part in self.lora.pipe.components.values() if isinstance(part, nn.Module)]

    def _not_needed(self) -> list[str]:
        data = self.recipe.data
        return [*(["vae"] if data.cache_latents else []), *(self.family.text_encoder_names if data.cache_text else [])]

    def _class_images(self) -> list[Item]:
        prior = self.recipe.prior
        if prior is None:
            return []
        side = (self.recipe.data.resolution or self.family.resolution) // self.family.multiple * self.family.multiple
        with processes.main_first(self.runner.device):
            return class_images(
                self.lora.pipe,
                prior,
                resolution=side,
                seed=self.recipe.training.seed,
                progress=self.run.progress,
            )

    def _attach(self) -> Adapters:
        seed_all(self.recipe.training.seed)
        handles: dict[str, Any] = {}
        try:
            for name, given in self.runner.arguments(self.lora.pipe).items():
                handles |= self.lora.attach(components=[name], adapter_name=self.runner.adapter_name, **given)
        except BaseException:
            for handle in handles.values():
                handle.detach()
            raise
        return Adapters(self.lora, handles)

    def _prepare(self, class_: Sequence[Item]) -> None:
        """Make the tasks, fill their caches, and put away what they replace."""
        runner, run, data = self.runner, self.run, self.recipe.data
        if run.resume_from is not None:
            self.adapters.take_values(run.resume_from)
            forget_after(run.facts.samples, step_of(run.resume_from))
        if self.recipe.training.gradient_checkpointing:
            for handle in self.adapters.handles.values():
                set_checkpointing(handle.base)
        batches = batches_for(runner, runner.train_items, class_)
        still = batches_for(runner, runner.eval_items, still=True)
        text = CachedText(self.family, _folder(data.cache_text, "text")) if data.cache_text else None
        trained = bool(runner.encoders)
        made = [
            task_for(
                runner,
                self.family,
                some,
                trained,
                CachedLatents(self.family, _folder(data.cache_latents, "latents")) if data.cache_latents else None,
                text,
            )
            for some in (batches, still)
        ]
        self.task, self.eval_task = made
        if self.away.names:
            run.progress.say(f"encoding images and captions once, then putting away {', '.join(self.away.names)}")
        self.task.fill(self._epochs(len(batches)))
        self.eval_task.fill(1)
        self.away.put()
        side = data.resolution or self.family.resolution
        self.sampler = Sampler(self.family, self.recipe.samples, runner.prompts, side, self.away)
        if self.recipe.training.compile:
            self._compiled = self.family.denoiser
            setattr(self.lora.pipe, self.family.denoiser_name, torch.compile(self._compiled, dynamic=False))

    def _epochs(self, batches: int) -> int:
        training = self.recipe.training
        per_epoch = steps_of(training, batches, processes.count())
        return math.ceil(total_steps(training, per_epoch) / per_epoch)

    # ---- training ----------------------------------------------------------------------------------------------------

    def parts(self) -> Parts:
        """Return what the loop works with."""
        training = self.recipe.training
        optimizer = self.runner.optimizer({name: handle.base for name, handle in self.adapters.handles.items()})
        every = self.recipe.samples.every

        def look(step: int) -> None:
            if every is not None and step % every == 0 and step != self.run.facts.total_steps:
                self.sampler.record(self.run, step)

        return Parts(
            self.task,
            self.task.inputs,
            self.task.loss,
            optimizer,
            lambda total, _: Schedule(training, optimizer, total),
            self.runner.device,
            self.runner.autocast,
            self.measure,
            look,
            rows="images",
            graphs=self.runner.cuda_graphs,
        )

    # ---- looking -----------------------------------------------------------------------------------------------------

    def measure(self) -> dict[str, float]:
        """Return the metrics of the pipeline as it is now."""
        with evaluating(self.adapters.model, self.runner.autocast):
            return {"loss": self.eval_task.measure()}

    def look_before(self) -> None:
        """Measure the base and make its images, unless the run that is resumed has."""
        facts = self.run.facts
        if not facts.before:
            self.run.progress.say(f"measuring the base on {len(self.runner.eval_items):,} images")
            with self.adapters.disabled():
                facts.before = self.measure()
                self.sampler.record(self.run, 0, "base")
            self.run.folder.write_facts(facts)
        self._change_scheduler()

    def look_after(self) -> None:
        """Measure the adapter and make its images."""
        self.run.progress.say("measuring the adapter")
        self.run.facts.after = self.measure()
        self.sampler.record(self.run, self.run.facts.steps, "adapter")

    def _change_scheduler(self) -> None:
        """Let the pipeline make images as it is trained to, where the objective is not its scheduler's own."""
        changes = self.task.objective.scheduler_changes
        if not changes:
            return
        changed = self.task.objective.for_inference(self.scheduler)
        self.lora.pipe.scheduler = changed
        said = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        note = (
            f"The adapter needs another scheduler: {type(changed).__name__}.from_config(pipe.scheduler.config, {said})."
        )
        if note not in self.run.facts.notes:
            self.run.facts.notes.append(note)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the pipeline whole, with the adapter."""
        self.away.back()
        if self._compiled is not None:
            setattr(self.lora.pipe, self.family.denoiser_name, self._compiled)
        if self.recipe.training.gradient_checkpointing:
            for handle in self.adapters.handles.values():
                stop_checkpointing(handle.base)
        self._modes.close()

    def undo(self) -> None:
        """Leave the pipeline as it was."""
        self.close()
        self.adapters.detach()
        self.lora.pipe.scheduler = self.scheduler


def check_in_memory(pipe: Any) -> None:
    """Raise for a pipeline whose parts are moved by hooks while it works: training needs them in place."""
    if any(hasattr(part, "_hf_hook") for part in pipe.components.values()):
        raise RequestError(
            "The pipeline is offloaded: call pipe.remove_all_hooks() and pipe.to(device) before training."
        )


def _folder(cache: str | None, name: str) -> Any:
    return cache_folder(name) if cache == "disk" else None
