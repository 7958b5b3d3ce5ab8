"""Token ids of plain texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = True) -> list[list[int]]:
    """Return the ids of each text, with what the tokenizer adds itself unless `special` is False."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]  # type: ignore[return-value]


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Add the end token unless the tokenizer did, so that the model learns to stop."""
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def unended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Take off an end token that the tokenizer adds: a prompt goes on."""
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
