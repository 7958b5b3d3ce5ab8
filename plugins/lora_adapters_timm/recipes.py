"""The recipe of the task image-classification, as pydantic models. Importing this imports neither torch nor timm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_adapters.recipes.sections import (
    AboveZero,
    DataSection,
    ModelSection,
    NotNegative,
    Positive,
    Probability,
    Recipe,
    Section,
    Share,
    TrainingSection,
)


class ImageModel(ModelSection):
    """The base model."""

    name: str
    """A model of timm ("vit_base_patch16_224.augreg_in21k"), "hf-hub:org/name", or a folder with config.json and weights."""
    revision: str | None = None
    """Branch, tag or commit; for "hf-hub:" names only."""
    trust_remote_code: Literal[False] = False
    """timm's models bring no code."""
    pretrained: bool = True
    """Start from the model's pretrained weights; false: from random ones, which the seed gives."""
    checkpoint: str | None = None
    """A file with the weights to start from (.safetensors, .pth, .bin); its classifier is replaced by a new one."""
    drop_rate: Share | None = None
    """Dropout before the classifier; left out: the model's own."""
    drop_path_rate: Share | None = None
    """Stochastic depth; left out: the model's own."""
    timm_kwargs: dict[str, bool | int | float | str | list[int] | None] = {}
    """Other arguments of timm.create_model, such as in_chans, global_pool or img_size."""

    @model_validator(mode="after")
    def _one_start(self):
        if self.checkpoint is not None and not self.pretrained:
            raise ValueError(
                "checkpoint gives the weights to start from, and pretrained=false says that there are none"
            )
        if own := sorted({"num_classes", "drop_rate", "drop_path_rate", "pretrained"} & set(self.timm_kwargs)):
            where = "data.labels gives it" if own[0] == "num_classes" else f"give model.{own[0]}"
            raise ValueError(f"timm_kwargs holds {own[0]}: {where}")
        return self


class ImageData(DataSection):
    """Images, sorted into one folder for each class."""

    train: str
    """A folder with one subfolder for each class, named as the class; or a dataset as timm names it: "torch/cifar10",
    "hfds/org/name"."""
    eval: str | None = None
    """The same for evaluation."""
    eval_fraction: Share = 0.0
    """Share of the training images to hold out for evaluation when `eval` is left out."""
    root: str | None = None
    """Where a dataset that timm names lies ("torch/..."); nothing is downloaded there."""
    split: str = "train"
    """Split of such a dataset to train on."""
    eval_split: str | None = None
    """Split of such a dataset to evaluate on."""
    labels: list[str] | None = None
    """The class names in the order of the classifier's outputs; left out: those of the training data, sorted."""
    limit: Positive | None = None
    """Use this many training images at most, drawn by the seed."""
    eval_limit: Positive | None = None
    """Use this many evaluation images at most, drawn by the seed."""
    check: Literal["decode", "open"] = "decode"
    """Decode every file of a folder before training, or only open it: broken ones are named then, not in the middle."""
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Pixels a side; left out: what the model was made for."""
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of an evaluation image's side that is kept; left out: what the model was made for."""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that read images; 0 reads in the training process. The images are the same."""


class Augmentation(Section):
    """What is done to training images, at random. The defaults are timm's."""

    enabled: bool = True
    """False: training images are prepared as evaluation images are."""
    scale: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.08, 1.0]
    """Least and largest share of the image's area that a random crop takes."""
    ratio: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.75, 1.3333]
    """Least and largest width to height of the crop."""
    hflip: Probability = 0.5
    """Probability of a mirror image."""
    vflip: Probability = 0.0
    """Probability of turning the image upside down."""
    color_jitter: NotNegative = 0.4
    """Change of brightness, contrast and saturation; not used where auto_augment is."""
    auto_augment: str | None = None
    """timm's policy, such as "rand-m9-mstd0.5-inc1", "original" or "augmix-m5-w4-d2"."""
    interpolation: Literal["random", "bilinear", "bicubic", "nearest"] = "random"
    """How training crops are resized."""
    erasing: Probability = 0.0
    """Probability of random erasing."""
    erasing_mode: Literal["const", "rand", "pixel"] = "const"
    """What is put in the place: zeros, one random colour, or noise."""
    mixup: NotNegative = 0.0
    """Alpha of mixup (arXiv:1710.09412); 0 is none."""
    cutmix: NotNegative = 0.0
    """Alpha of CutMix (arXiv:1905.04899); 0 is none."""
    mix_probability: Probability = 1.0
    """Probability that a batch is mixed."""
    mix_switch: Probability = 0.5
    """Where both are given: probability of CutMix instead of mixup."""
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    """Mix by one amount for each batch, pair or image."""

    @model_validator(mode="after")
    def _ranges(self):
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise ValueError(
                    f"{name}: give the least, then the largest, such as {type(self).model_fields[name].default}"
                )
        if not self.enabled and (others := sorted(self.changed() - {"enabled"})):
            raise ValueError(f"{others[0]} says how to augment, and enabled=false that nothing is: give one")
        return self

    def changed(self) -> set[str]:
        """Return the names of the keys whose value is not the default."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}


class ImageTraining(TrainingSection):
    """How to train. Times are in optimizer steps unless they are in epochs."""

    optimizer: str = "adamw"
    """Any optimizer of timm ("adamw", "sgd", "lamb", "lion", ...; timm.optim.list_optimizers()), or "adamw_8bit"."""
    optimizer_options: dict[str, bool | int | float | list[float]] = {}
    """Other arguments of it, such as betas, eps or momentum."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """The learning rate of a layer is that of the layer after it times this (timm's groups of layers)."""
    schedule: Literal["linear", "cosine", "constant", "step", "multistep", "tanh"] = "linear"
    """How the learning rate falls after the warm-up (timm.scheduler)."""
    min_learning_rate: NotNegative = 0.0
    """Where linear, cosine and tanh end."""
    decay_epochs: AboveZero = 30.0
    """Epochs between the falls of schedule=step."""
    decay_milestones: list[AboveZero] = [30.0, 60.0]
    """Epochs at which schedule=multistep falls."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What a fall of step and multistep multiplies the learning rate by."""
    label_smoothing: Share = 0.0
    """Share of the target that is spread over all classes."""
    ema: Share = 0.0
    """Decay of a moving average of the trained values, which is what is measured and saved; it grows to this; 0 is none."""
    channels_last: bool = False
    """Keep images and convolutions with the channels last, which is faster on many devices."""


class ImageRecipe(Recipe):
    """Adapt an image model to classes of images."""

    task: Literal["image-classification"]
    """What to train."""
    model: ImageModel
    """The base model."""
    data: ImageData
    """What to train on."""
    augmentation: Augmentation = Augmentation()
    """What is done to training images."""
    training: ImageTraining = ImageTraining()
    """How to train."""
    samples: Annotated[int, Field(ge=0, le=50)] = 8
    """Evaluation images to show with their predictions in the report."""

    @model_validator(mode="after")
    def _one_size(self):
        if self.data.image_size is not None and self.model.timm_kwargs.get("img_size", self.data.image_size) != (
            self.data.image_size
        ):
            raise ValueError("data.image_size and model.timm_kwargs.img_size are of other sizes: give the first")
        return self
