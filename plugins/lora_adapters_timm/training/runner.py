"""The task image-classification: what `lora-adapters train`, `plan`, `eval` and `generate` ask of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_adapters as la
from lora_adapters.attach_plan import AttachPlan
from lora_adapters.errors import RequestError
from lora_adapters.inject import planned_on_meta, quantize
from lora_adapters.memory import StepMemory, predict_step
from lora_adapters.pictures import open_image, png
from lora_adapters.recipes.adapting import attach_arguments, check_start
from lora_adapters.report.facts import Sample
from lora_adapters.runs.beginning import record_adapter, record_data, record_memory
from lora_adapters.runs.class_measures import likeliest
from lora_adapters.runs.gradients import GradientGuard
from lora_adapters.runs.keeping import raise_unless_finished, save_adapter
from lora_adapters.runs.loop import Parts, TrainingLoop
from lora_adapters.runs.measuring import Measured, evaluating
from lora_adapters.runs.progress import Progress
from lora_adapters.runs.random_state import seed_all
from lora_adapters.runs.recipe_runner import RowsRunner
from lora_adapters.runs.requirements import check_training, compute_dtype
from lora_adapters.runs.runner import Run

from ..augmentation import Mixing, Prepared, evaluation_transform, training_transform
from ..data import Images, check_count, check_labels, divide, image_mode, limited, read_images
from ..recipes import ImageRecipe
from . import base_model
from .batches import ImageBatches
from .measures import measure
from .optimization import make_optimizer, make_schedule, memory_of

_RANDOM = "The base has random weights, which come from the seed and are saved nowhere."


class ImageRunner(RowsRunner):
    """See `lora_adapters.runs.runner.Runner`.

    Args:
        recipe: the validated recipe.
    """

    rows = "images"

    def __init__(self, recipe: ImageRecipe) -> None:
        super().__init__(recipe)
        self.train_images: Images | None = None
        self.eval_images: Images | None = None

    # ---- before a weight is read -------------------------------------------------------------------------------------

    @property
    def labels(self) -> list[str]:
        """The class names, in the order of the classifier's outputs."""
        if self.recipe.data.labels is None:
            raise RequestError(
                "data.labels: the adapter does not say its classes. Give their names in the order it was trained with: "
                "'data.labels=[cat, dog]'."
            )
        return self.recipe.data.labels

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model on the meta device."""
        model = base_model.skeleton(self.recipe.model, self.recipe.data.image_size, len(self.labels))
        config = base_model.data_config(model, self.recipe.model, self.recipe.data)
        base_model.check_takes(model, config)
        base_model.note_size(model, config)
        return model

    @cached_property
    def config(self) -> dict[str, Any]:
        """What images must be for the model; see `base_model.data_config`."""
        return base_model.data_config(self.skeleton, self.recipe.model, self.recipe.data)

    def check(self, parts: Sequence[str] = ("train", "eval")) -> None:
        """Find what is wrong with the recipe, read the folders, and plan the adapter; no weight is read."""
        training = self.recipe.training
        self.check_eval(parts, "FOLDER")
        _ = self.device, self.autocast
        check_training(training)
        make_optimizer(training, [nn.Parameter(torch.zeros(1))])
        base_model.source_of(self.recipe.model)
        self._read(parts)
        image_mode(self.config["input_size"][0])
        if "train" in parts:
            training_transform(self.config, self.recipe.augmentation)
            check_start(self.recipe.adapter, self.recipe.model.quantization)
            _ = self.made_plan
            if training.gradient_checkpointing:
                base_model.set_checkpointing(copy.deepcopy(self.skeleton))

    def _read(self, parts: Sequence[str]) -> None:
        """Set `train_images` and `eval_images`; the classes of the training images become part of the recipe."""
        data, seed = self.recipe.data, self.recipe.training.seed
        train = read_images(data, "train") if "train" in parts or data.eval_fraction else None
        held_out = read_images(data, "eval") if data.eval is not None or data.eval_split is not None else None
        if data.labels is None and "train" in parts and train is not None:
            data.labels = train.classes
        check_count(self.labels)
        if train is not None and data.eval_fraction:
            train, held_out = divide(train, data.eval_fraction, seed)
        if train is not None and "train" in parts:
            check_labels(train, self.labels, "train")
            self.train_images = limited(train, data.limit, seed)
        if held_out is not None:
            check_labels(held_out, self.labels, "eval")
            self.eval_images = limited(held_out, data.eval_limit, seed)

    def shape(self) -> tuple[int, int]:
        """Return the images of one forward pass; they have no tokens."""
        return self.recipe.training.batch_size, 1

    def plan(self, quantization: Any) -> AttachPlan:
        """Return the recipe's plan for a base stored as `quantization` says."""
        return la.plan(self.skeleton, **attach_arguments(self.recipe.adapter), quantization=quantization)

    def memory(
        self, plan: AttachPlan, batch_size: int, length: int, checkpointing: bool, device: str | None = None
    ) -> StepMemory:
        """Predict a step; see `Runner.memory`."""
        there = torch.device(device or self.device.type)
        # Models call their images by different names.
        name = next(iter(inspect.signature(self.skeleton.forward).parameters))
        dtype = next(p.dtype for p in self.skeleton.parameters())
        autocast = compute_dtype(self.recipe.training, there)
        images = torch.zeros(batch_size, *self.config["input_size"], dtype=torch.float32 if autocast else dtype)
        return predict_step(
            planned_on_meta(self.skeleton, plan),
            {name: images},
            optimizer=memory_of(self.recipe.training),
            autocast=autocast,
            device=there.type,
            checkpointing=checkpointing or None,
            loss=lambda logits: F.cross_entropy(logits.float(), torch.zeros_like(logits, dtype=torch.float32)),
        )

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, run: Run) -> None:
        """Train; see `Runner.train`."""
        assert self.train_images is not None
        parts = {"train": self.train_images, "eval": self.eval_images}
        record_data(run, [part.facts(name) for name, part in parts.items() if part is not None])
        run.facts.labels, run.facts.higher_is_better = self.labels, ["accuracy", "macro_f1"]
        if len(self.labels) > 5 and self.eval_images is not None:
            run.facts.higher_is_better.append("top5_accuracy")
        with run.preparing():
            record_memory(run, self, self.made_plan, self.device)
            model = self.load(run.progress)
            if run.resume_from is None:
                adapter = la.attach(model, **attach_arguments(self.recipe.adapter))
            else:
                adapter = la.restore(model, run.resume_from)
            record_adapter(run, adapter)
            if not self.recipe.model.pretrained and _RANDOM not in run.facts.notes:
                run.facts.notes.append(_RANDOM)
            self.measure_base(run, adapter.model)
        guard = GradientGuard(run)
        loop = TrainingLoop(run, adapter, guard, self._parts(adapter))
        loop.fit()
        with loop.averaged():
            save_adapter(run, adapter, guard)
            raise_unless_finished(run, guard)
            with run.measuring():
                self.measure_adapter(run, adapter.model)

    def load(self, progress: Progress) -> nn.Module:
        """Return the base; see `RecipeRunner.load`."""
        section, seed = self.recipe.model, self.recipe.training.seed
        progress.say(f"loading {section.name}")
        seed_all(seed)
        model = base_model.build(section, len(self.labels))
        base_model.note_size(model, self.config)
        if self.autocast is not None:  # what is trained whole is trained in float32
            for name in self.made_plan.trained:
                model.get_submodule(name).float()
        model.to(self.device)
        if section.quantization is not None:
            quantize(model, la.plan(model, **attach_arguments(self.recipe.adapter), quantization=section.quantization))
        if self.recipe.training.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.recipe.training.gradient_checkpointing:
            base_model.set_checkpointing(model)
        seed_all(seed)
        return model

    def _parts(self, adapter: Any) -> Parts:
        assert self.train_images is not None
        recipe, training, device = self.recipe, self.recipe.training, self.device
        transform = training_transform(self.config, recipe.augmentation)
        drawn = training.seed if recipe.augmentation.enabled else None
        prepared = Prepared(self.train_images, self.labels, transform, self.config["input_size"][0], drawn)
        batches = ImageBatches(
            prepared, training.batch_size, training.seed, recipe.data.workers, pin=device.type == "cuda"
        )
        optimizer = make_optimizer(training, adapter.base)
        return Parts(
            batches,
            self._inputs(),
            self._loss(adapter.model),
            optimizer,
            partial(make_schedule, training, optimizer),
            device,
            self.autocast,
            None if self.eval_images is None else lambda: self.measure_eval(adapter.model).metrics,
            rows="images",
        )

    def _inputs(self) -> Callable[[Any, int, int], dict[str, Tensor | None]]:
        """Return what mixes the images of a batch as the recipe says, and puts them where the model is."""
        recipe = self.recipe
        mixing = Mixing(recipe.augmentation, recipe.training.label_smoothing, len(self.labels), recipe.training.seed)

        def inputs(batch: tuple[Tensor, Tensor], step: int, number: int) -> dict[str, Tensor | None]:
            images, targets = mixing(*batch, step, number)
            return {"images": self._place(images), "targets": targets.to(self.device)}

        return inputs

    def _loss(self, model: Any) -> Callable[[Mapping[str, Tensor | None]], Tensor]:
        forward = torch.compile(model) if self.recipe.training.compile else model

        def loss(inputs: Mapping[str, Tensor | None]) -> Tensor:
            targets = inputs["targets"]
            assert targets is not None
            return F.cross_entropy(forward(inputs["images"]).float(), targets)

        return loss

    def _place(self, images: Tensor) -> Tensor:
        """Return images (rows, channels, height, width) where and as the model takes them."""
        dtype = images.dtype if self.autocast else next(p.dtype for p in self.skeleton.parameters())
        layout = torch.channels_last if self.recipe.training.channels_last else torch.contiguous_format
        return images.to(self.device, dtype, non_blocking=True, memory_format=layout)

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @property
    def eval_count(self) -> int:
        """Return the number of eval images."""
        return 0 if self.eval_images is None else len(self.eval_images)

    def measure_eval(self, model: Any) -> Measured:
        """Return the metrics of a model on the eval images."""
        assert self.eval_images is not None
        transform, channels = evaluation_transform(self.config), self.config["input_size"][0]
        prepared = Prepared(self.eval_images, self.labels, transform, channels, None)
        size, workers = self.recipe.training.batch_size, self.recipe.data.workers
        return measure(model, prepared, self.labels, size, workers, self._place, self.autocast)

    def show_eval(self, model: Any, measured: Measured, count: int) -> list[Sample]:
        """Return some images drawn by the seed; the last part of a sample is what the model takes it for."""
        images = self.eval_images
        assert images is not None
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.recipe.training.seed)).tolist()
        return [
            Sample(
                str(images.items[i]) if isinstance(images.items[i], str) else f"Eval image {images.items[i]}",
                [("class", images.labels[i]), ("predicted", measured.outputs[i])],
                [("image", png(images.read(images.items[i])))],
            )
            for i in order[:count]
        ]

    def generate(
        self, adapters: Mapping[str, Path], prompts: Sequence[str], progress: Progress, **options: Any
    ) -> list[Sample]:
        """Return what the base and each adapter take image files for: prompts are paths. See `Runner.generate`."""
        pictures = [open_image(prompt) for prompt in prompts]
        base_model.source_of(self.recipe.model)
        transform, mode = evaluation_transform(self.config), image_mode(self.config["input_size"][0])
        found = [Sample(prompt, [], [("image", png(one))]) for prompt, one in zip(prompts, pictures, strict=True)]
        for name, model in self.each(adapters, progress):
            for sample, picture in zip(found, pictures, strict=True):
                with evaluating(model, self.autocast):
                    logits = model(self._place(transform(picture.convert(mode))[None]))[0]
                    sample.parts.append((name, likeliest(logits, self.labels)))
        return found
