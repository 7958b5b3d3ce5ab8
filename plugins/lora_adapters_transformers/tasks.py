"""What a transformers model was made for: its task type, its heads, and inputs of one training step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .targets import INNER_HEADS

#: PEFT's task type -> registries of transformers that hold such models, then the class names of models outside them.
_TASKS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("SEQ_CLS", ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",), r"ForSequenceClassification$|RewardModel$"),
    ("TOKEN_CLS", ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",), r"ForTokenClassification$"),
    ("QUESTION_ANS", ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",), r"ForQuestionAnswering(Simple)?$"),
    ("SEQ_2_SEQ_LM", ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",), r"(?!)"),
    ("CAUSAL_LM", ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
     r"ForCausalLM$|LMHeadModel$|ForConditionalGeneration$"),
)  # fmt: skip
#: Class names of models whose head is new for every task.
_NEW_HEAD = re.compile(r"Classification|QuestionAnswering|MultipleChoice|Regression|NextSentence|RewardModel|Ranking")


def _registered(registry: str) -> Iterator[str]:
    for classes in getattr(modeling_auto, registry, {}).values():
        yield from (classes,) if isinstance(classes, str) else classes


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's task type for a model, from transformers' registries, else from the class name, else None."""
    name = type(model).__name__
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for task, registries, pattern in _TASKS:
        if task == "SEQ_2_SEQ_LM" and not encoder_decoder:
            continue
        if any(name in _registered(r) for r in registries) or re.search(pattern, name):
            return "SEQ_2_SEQ_LM" if task == "CAUSAL_LM" and encoder_decoder and "Causal" not in name else task
    return "FEATURE_EXTRACTION" if re.search(r"(?<!Head)(?<!Decoder)Model$", name) else None


def _own_children(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children that a task class adds beside its base model, those with parameters."""
    base = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else None
    if base is model or not isinstance(base, nn.Module):
        return
    for name, child in model.named_children():
        if child is not base and not isinstance(child, PreTrainedModel) and any(True for _ in child.parameters()):
            yield name, child


def heads_to_train(model: nn.Module) -> tuple[str, ...]:
    """Return the modules that are new for the task: all that a task class adds, but no language model head."""
    name = type(model).__name__
    if name in INNER_HEADS:
        return INNER_HEADS[name]
    if not isinstance(model, PreTrainedModel) or not _NEW_HEAD.search(name):
        return ()
    output = model.get_output_embeddings()
    return tuple(name for name, child in _own_children(model) if child is not output)


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Return names of the modules that turn the last hidden state into the output, in the model and those inside."""
    found = list(INNER_HEADS.get(type(model).__name__, ()))
    for prefix, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        output = part.get_output_embeddings()
        names = [n for n, m in part.named_modules() if m is output and n] if output is not None else []
        if re.search(r"For[A-Z]|LMHead|WithLM", type(part).__name__):
            names += [n for n, _ in _own_children(part) if not re.search(r"project(or|ion)$|connector|align", n)
                      or n in ("output_projection", "proj_out")]  # fmt: skip
        found += [f"{prefix}.{n}".lstrip(".") for n in names]
    return tuple(dict.fromkeys(found))


def family(model: nn.Module) -> str:
    """Return `config.model_type`, else the class name."""
    return str(getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__)


def forward_parameters(model: nn.Module) -> set[str]:
    """Return names of the arguments that the model's forward takes."""
    import inspect

    return set(inspect.signature(model.forward).parameters)


def text_config(config: Any) -> Any:
    """Return the part of a config that describes the text model."""
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, ValueError, TypeError):
        return config
