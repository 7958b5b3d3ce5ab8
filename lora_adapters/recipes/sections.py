"""The parts of a recipe that every task shares, as pydantic models. A task's own recipe derives from `Recipe`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: The version of the format, the first line of a recipe.
SCHEMA = 1

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]

#: Numbers as messages write them.
_COUNTS = {2: "two", 3: "three"}


class Section(BaseModel):
    """A mapping in a recipe: unknown keys and values of another type are errors, nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelSection(Section):
    """The base model."""

    name: str
    """A folder, or a name on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    quantization: str | dict[str, str] | None = None
    """"nf4", "fp4", "int8", a plugin's quantizer, or a mapping of roles to one of them. Left out: dense."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of dense weights; auto is the checkpoint's."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", "mps"; auto takes an accelerator if there is one."""
    trust_remote_code: bool = False
    """Run code that the checkpoint brings. Only if you trust its author."""


class DataSection(Section):
    """What to train on, and what to measure on: `eval`, `eval_split` and `eval_fraction`, as far as a task has them."""

    @model_validator(mode="after")
    def _one_way_to_evaluate(self):
        ways = [name for name in ("eval", "eval_split", "eval_fraction") if name in type(self).model_fields]
        if sum(getattr(self, name) not in (None, 0) for name in ways) > 1:
            listed = f"{', '.join(ways[:-1])} and {ways[-1]}"
            raise ValueError(f"{listed} are {_COUNTS[len(ways)]} ways to say the same: give one")
        return self


class AdapterSection(Section):
    """The adapter: what `lora_adapters.attach` takes."""

    rank: Annotated[int, Field(ge=1, le=65536)] = 16
    """Rank of A and B."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale times rank; the rank itself if left out, a scale of 1."""
    targets: str | list[str] | dict[str, int | dict[str, int | float]] = "auto"
    """What to adapt: "auto", a role expression such as "attention+mlp", names, or a mapping of these to a rank."""
    dropout: Share = 0.0
    """Probability of zeroing an input of A."""
    layers: list[int] | None = None
    """Indices of the blocks to adapt; all if left out."""
    exclude: list[str] | None = None
    """Names of modules to leave alone."""
    modules_to_save: list[str] | None = None
    """Modules to train and save whole; left out: a new task head, if the model has one."""
    init: bool | str = True
    """How A and B start: PEFT's `init_lora_weights` ("pissa", "olora", "gaussian", ...)."""
    dora: bool = False
    """Weight-decomposed LoRA (PEFT's `use_dora`)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (PEFT's `use_rslora`)."""
    fused: Literal["auto", False] = "auto"
    """"auto" computes each layer in the fastest way that is exact; false runs PEFT's own forward everywhere."""
    norm: Literal["eval", "train", "affine"] = "eval"
    """BatchNorm: "eval" keeps the base's statistics, "train" updates and saves them, "affine" trains its weights too."""
    liger: Literal["auto"] | bool = False
    """Liger's kernels for norms, gated MLPs, rotary embedding and loss: true, false or "auto" (where there are some)."""


class TrainingSection(Section):
    """How to train. Times are in optimizer steps."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training data."""
    max_steps: Positive | None = None
    """Stop after this many steps, whatever `epochs` says."""
    batch_size: Positive = 4
    """Rows per device and forward pass."""
    gradient_accumulation: Positive = 1
    """Forward passes per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Highest learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1 a share of all steps, else a number of steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Share of each weight that a step takes off, times the learning rate."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    optimizer: Literal["adamw", "adamw_8bit", "sgd", "adafactor"] = "adamw"
    """adamw_8bit keeps its state in a quarter of the memory; it needs bitsandbytes."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the computation; auto is bfloat16 on a GPU that has it, float16 on one that has not, float32 elsewhere."""
    gradient_checkpointing: bool = False
    """Less memory, about a third more time."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of everything random: A's start, the order of rows, dropout, the rows held out."""
    nan: Literal["stop", "skip", "raise"] = "stop"
    """At a gradient that is not finite: stop and keep the last finite adapter, skip the step, or raise at once."""
    log_every: Positive = 10
    """Steps between the points of the curves."""
    save_every: Positive | None = None
    """Steps between checkpoints; a tenth of the run if left out."""
    keep_checkpoints: Positive = 1
    """How many checkpoints to keep."""
    eval_every: Positive | None = None
    """Steps between evaluations; left out: before and after training only."""
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Where else to report to; each needs its package."""
    compile: bool = False
    """Run the model through torch.compile."""


class Recipe(Section):
    """A whole recipe. A task derives its own, with `task` as a Literal and its own `data` and `training`."""

    schema_version: Annotated[Literal[1], Field(alias="schema")] = SCHEMA
    """Version of the format."""
    task: str
    """What to train."""
    model: ModelSection
    """The base model."""
    adapter: AdapterSection = AdapterSection()
    """The adapter."""
    data: Any
    """What to train on."""
    training: TrainingSection = TrainingSection()
    """How to train."""
    output: str
    """Folder of the run. A new one, unless resume or overwrite say otherwise."""
    resume: bool = False
    """Go on from the newest complete checkpoint in `output`."""
    overwrite: bool = False
    """Let a finished run in `output` make way."""

    @model_validator(mode="after")
    def _resume_or_overwrite(self) -> Recipe:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other: give one")
        return self
