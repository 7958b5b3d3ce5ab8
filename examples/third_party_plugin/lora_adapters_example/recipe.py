"""The recipe of the task mixer-classification. Importing it must stay cheap: pydantic, no torch."""

from typing import Annotated, Literal

from pydantic import Field

from lora_adapters.recipes.sections import ModelSection, Recipe, Section, Share, TrainingSection


class MixerModel(ModelSection):
    """The base model."""

    dtype: Literal["auto", "float32"] = "auto"
    """Dtype of dense weights: images are float32, so the model is."""


class MixerData(Section):
    """Small images with labels. What a key means is its docstring: editors and `lora-adapters schema` show it."""

    train: str
    """An .npz file with `images` (rows, height, width) or (rows, height, width, colours) and `labels` (rows)."""
    eval: str | None = None
    """The same for evaluation."""
    eval_fraction: Share = 0.0
    """Share of the training rows to hold out for evaluation when `eval` is left out."""
    labels: list[str] | None = None
    """The label names in the order of the classifier's outputs; left out: those of the training data, sorted."""


class MixerTraining(TrainingSection):
    """How to train. Keys that this task can't honour take one value only, which `train` checks before anything else."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer, as in torch.optim."""
    precision: Literal["auto", "float32"] = "auto"
    """Always the weights' own."""
    gradient_checkpointing: Literal[False] = False
    """Mixer can't."""
    report_to: Annotated[list[str], Field(max_length=0)] = []
    """Nowhere but the run's folder."""
    compile: Literal[False] = False
    """Mixers are too small for it."""


class MixerRecipe(Recipe):
    """Adapt a Mixer to images of other classes."""

    task: Literal["mixer-classification"]
    """What to train."""
    model: MixerModel
    """The base model."""
    data: MixerData
    """What to train on."""
    training: MixerTraining = MixerTraining()
    """How to train."""
    samples: Annotated[int, Field(ge=0, le=50)] = 5
    """Evaluation images to show in the report."""
