"""The demo's second part: a small language model that learns another kind of text. Its data is in `demo_data`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .demo_data import TextCorpus, language_data
from .demo_training import Clock, Progress, no_progress, quiet, run_trainer


@dataclass(frozen=True)
class LanguageModelSettings:
    """Size of the language model, what it learns from, and how."""

    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 4
    context: int = 128
    batch_size: int = 16
    prose_characters: int = 600_000
    code_characters: int = 300_000
    test_characters: int = 40_000
    pretrain_epochs: int = 3
    pretrain_learning_rate: float = 3e-3
    rank: int = 16
    learning_rate: float = 1e-2
    seed: int = 0


@dataclass(frozen=True)
class LanguageModelResult:
    """Measured numbers of the language model part. Perplexities are per token of the model's tokenizer.

    Attributes:
        parameters: values of the pretrained model.
        prose_perplexity: of the pretrained model on held-out prose, the kind of text it was pretrained on.
        before_perplexity: of the pretrained model on held-out code.
        after_perplexity: of the adapted model on the same code.
        merged_perplexity: of the plain model that merging leaves, on the same code.
        trainable_share: values that the LoRA run trained, as a share of all values.
        seconds: stage -> seconds.
    """

    parameters: int
    prose_perplexity: float
    before_perplexity: float
    after_perplexity: float
    merged_perplexity: float
    trainable_share: float
    seconds: dict[str, float]


def run_language_model(
    folder: Path, settings: LanguageModelSettings | None = None, progress: Progress = no_progress
) -> LanguageModelResult:
    """Pretrain a small Llama on English docstrings, then adapt it to Python code with LoRA.

    Args:
        folder: where the adapter is saved (`folder/adapter`) and Trainer may write.
        settings: None takes the demo's own.
        progress: told how far each stage is.
    """
    import lora_adapters

    settings = settings or LanguageModelSettings()
    clock = Clock(progress)
    with quiet("transformers"):
        with clock.stage("Reading the standard library"):
            data = language_data(settings.prose_characters, settings.code_characters, settings.test_characters)
            encode = _tokenizer(data.prose, settings.vocabulary)
            prose, code = (_blocks(corpus, encode, settings.context) for corpus in (data.prose, data.code))
        model = _small_llama(settings)
        with clock.stage("Pretraining on English"):
            _fit_language(
                model, prose[0], settings, settings.pretrain_learning_rate, settings.pretrain_epochs, folder, clock
            )
        prose_perplexity, before = perplexity(model, prose[1]), perplexity(model, code[1])
        adapter = lora_adapters.attach(model, rank=settings.rank, targets="all-linear", seed=settings.seed)
        with clock.stage("Adapting to Python with LoRA"):
            _fit_language(adapter.model, code[0], settings, settings.learning_rate, 1, folder, clock)
        after = perplexity(model, code[1])
        adapter.save(folder / "adapter")
        parameters = adapter.plan.total_parameters
        trained = adapter.plan.adapter_parameters
        merged = perplexity(adapter.merge(unload=True), code[1])
    return LanguageModelResult(
        parameters=parameters,
        prose_perplexity=prose_perplexity,
        before_perplexity=before,
        after_perplexity=after,
        merged_perplexity=merged,
        trainable_share=trained / (parameters + trained),
        seconds=clock.seconds,
    )


def _tokenizer(corpus: TextCorpus, vocabulary: int) -> Callable[[str], list[int]]:
    """Train a byte-level BPE on the pretraining text alone; a passage ends with token 0."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(corpus.train, vocab_size=vocabulary, special_tokens=["<|end|>"], show_progress=False)
    return lambda text: [*tokenizer.encode(text).ids, 0]


def _blocks(
    corpus: TextCorpus, encode: Callable[[str], list[int]], context: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return training and held-out text as lists of (context,) token blocks; what fills no block is left out."""

    def cut(texts: Sequence[str]) -> list[torch.Tensor]:
        ids = torch.tensor([token for text in texts for token in encode(text)])
        return list(ids[: len(ids) // context * context].reshape(-1, context))

    return cut(corpus.train), cut(corpus.test)


def _small_llama(settings: LanguageModelSettings) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=3 * settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=settings.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def _fit_language(
    model, blocks, settings: LanguageModelSettings, rate: float, epochs: int, folder: Path, clock: Clock
) -> None:
    def stack(batch: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = torch.stack(list(batch))
        return {"input_ids": ids, "labels": ids}

    options = {"learning_rate": rate, "num_train_epochs": epochs, "weight_decay": 0.1}
    run_trainer(model, blocks, stack, folder, clock, settings.batch_size, settings.seed, **options)


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Sequence[torch.Tensor]) -> float:
    """Return exp of the mean cross-entropy per predicted token over all blocks, each read on its own."""
    model.eval()
    losses = []
    for start in range(0, len(blocks), 16):
        ids = torch.stack(list(blocks[start : start + 16]))
        logits = model(input_ids=ids).logits[:, :-1].float()
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).mean().item())
