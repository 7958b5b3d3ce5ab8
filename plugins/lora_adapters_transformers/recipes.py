"""The recipes of the text tasks, as pydantic models. Importing this imports neither torch nor transformers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_adapters.recipes.sections import DataSection, Positive, Recipe, Share, TrainingSection


class TextData(DataSection):
    """Where the rows come from. Columns are named, or a template such as "{question}\\n{answer}" is filled from them."""

    train: str | list[str]
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt, each also .gz), a folder of such files, a list of files, or the
    name of a dataset on the Hub."""
    eval: str | list[str] | None = None
    """The same for evaluation."""
    eval_fraction: Share = 0.0
    """Share of the training rows to hold out for evaluation when `eval` is left out."""
    subset: str | None = None
    """Configuration of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset to train on."""
    eval_split: str | None = None
    """Split of a Hub dataset to evaluate on."""
    limit: Positive | None = None
    """Use this many training rows at most."""
    eval_limit: Positive | None = None
    """Use this many evaluation rows at most."""


class CausalLMData(TextData):
    """One of three forms; left out, it is found from the columns: `messages`, `prompt` + `completion`, or `text`."""

    text: str | None = None
    """Column or template of plain text; the loss is on all of it."""
    prompt: str | None = None
    """Column or template of what is given."""
    completion: str | None = None
    """Column or template of the answer; the loss is on it alone."""
    messages: str | None = None
    """Column of chat messages ({"role", "content"}, or {"from", "value"}); the loss is on the assistant's alone."""
    system: str | None = None
    """A system message to put before each prompt or chat."""
    chat_template: bool | None = None
    """Put prompt and completion through the tokenizer's chat template; left out: if the tokenizer has one."""
    loss_on: Literal["answer", "all"] = "answer"
    """Where a form has an answer: train on it alone, or on all tokens."""

    @model_validator(mode="after")
    def _one_form(self):
        given = [name for name in ("text", "prompt", "messages") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are different forms: give one")
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together: give both")
        return self


class Seq2SeqData(TextData):
    """A source text and the target to write."""

    source: str
    """Column or template of the source."""
    target: str
    """Column or template of the target."""


class ClassificationData(TextData):
    """A text and its label."""

    text: str = "text"
    """Column or template of the text."""
    text_pair: str | None = None
    """Column or template of a second text."""
    label: str = "label"
    """Column of the label: a name, a number, or true and false."""
    labels: list[str] | None = None
    """The label names in the order of the head's outputs; left out: those of the training data, sorted."""


class RewardData(TextData):
    """A better and a worse answer to the same prompt."""

    prompt: str | None = None
    """Column or template of the prompt; left out if `chosen` and `rejected` hold it."""
    chosen: str = "chosen"
    """Column or template of the better answer, a text or chat messages."""
    rejected: str = "rejected"
    """Column or template of the worse answer."""


class TextTraining(TrainingSection):
    """How to train on text."""

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens per row; longer rows are handled as `too_long` says, counted and reported."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What becomes of rows longer than max_length."""


class CausalLMTraining(TextTraining):
    """How to train a causal language model."""

    packing: bool = False
    """Put several rows into one of max_length; none sees another, which is checked on the model before training."""


class Seq2SeqTraining(TextTraining):
    """How to train an encoder-decoder."""

    max_target_length: Annotated[int, Field(ge=2)] = 256
    """Tokens per target."""
    beams: Positive = 1
    """Beams when generating for ROUGE."""


class RewardTraining(TextTraining):
    """How to train a reward model (Bradley-Terry loss, through TRL's RewardTrainer)."""

    center_rewards: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared sum of both rewards, which keeps them around zero (arXiv:2312.09244)."""


class CausalLMRecipe(Recipe):
    """Fine-tune a causal language model on text, instructions or chats."""

    task: Literal["causal-lm"]
    """What to train."""
    data: CausalLMData
    """What to train on."""
    training: CausalLMTraining = CausalLMTraining()
    """How to train."""
    samples: Annotated[int, Field(ge=0, le=50)] = 3
    """Evaluation prompts to answer before and after training, for the report."""


class Seq2SeqRecipe(Recipe):
    """Fine-tune an encoder-decoder to write a target from a source."""

    task: Literal["seq2seq"]
    """What to train."""
    data: Seq2SeqData
    """What to train on."""
    training: Seq2SeqTraining = Seq2SeqTraining()
    """How to train."""
    samples: Annotated[int, Field(ge=0, le=50)] = 3
    """Evaluation sources to answer before and after training, for the report."""


class ClassificationRecipe(Recipe):
    """Fine-tune a text classifier."""

    task: Literal["text-classification"]
    """What to train."""
    data: ClassificationData
    """What to train on."""
    training: TextTraining = TextTraining()
    """How to train."""
    samples: Annotated[int, Field(ge=0, le=50)] = 5
    """Evaluation texts to show with their predictions in the report."""


class RewardRecipe(Recipe):
    """Train a reward model on pairs of answers."""

    task: Literal["reward"]
    """What to train."""
    data: RewardData
    """What to train on."""
    training: RewardTraining = RewardTraining()
    """How to train."""
    samples: Annotated[int, Field(ge=0, le=50)] = 3
    """Evaluation pairs to show with their rewards in the report."""
