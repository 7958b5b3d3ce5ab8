"""One encoded example as text, with what carries the loss: a look at the data before training on it."""

from __future__ import annotations

import itertools
import sys
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_adapters_transformers.data.encoded import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CUT = 1200


def preview(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return the row's `input_ids` as text, in spans with and without loss, special tokens included.

    The texts joined are the decoded row, save where a character's bytes are divided between two spans.
    """
    spans, ids = [], list(row["input_ids"])
    start, before = 0, ""
    for flag, group in itertools.groupby(label != IGNORED for label in row["labels"]):
        end = start + len(list(group))
        after = _decode(ids[:end], tokenizer)
        # Some tokenizers drop a blank at the beginning of what they decode, so a span is what it adds to the text.
        text = after[len(before) :] if after.startswith(before) else _decode(ids[start:end], tokenizer)
        spans.append((text, flag))
        start, before = end, after
    return spans


def show(spans: list[tuple[str, bool]], title: str = "one example, with what is learnt marked") -> None:
    """Print spans on stderr: on a terminal in two styles, elsewhere with [loss] and [/loss] around what carries a loss.

    Nothing in the texts is obeyed: control characters are spelt out, markup is text. Line breaks and tabs are shown by a
    sign, and long spans lose their middle.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    text = Text(f"{title}:\n", style="")
    for span, learnt in spans:
        shown = _visible(_shorter(span))
        if console.is_terminal:
            text.append(shown, style="bold green" if learnt else "dim")
        else:
            shown = shown.replace("[loss]", "\\[loss]").replace("[/loss]", "\\[/loss]")
            text.append(f"[loss]{shown}[/loss]" if learnt else shown)
    encoding = sys.stderr.encoding or "utf-8"
    if text.plain.encode(encoding, "replace").decode(encoding) != text.plain:
        # A terminal without these characters: spell them out rather than fail.
        parts = [(part.plain, part.style) for part in text.split("\n", include_separator=True)]
        text = Text.assemble(
            *[(plain.encode(encoding, "backslashreplace").decode(encoding), style) for plain, style in parts]
        )
    console.print(text, soft_wrap=True)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # type: ignore[return-value]


def _shorter(text: str) -> str:
    if len(text) <= _CUT:
        return text
    half = _CUT // 2
    return f"{text[:half]} … {len(text) - 2 * half} more characters … {text[-half:]}"


def _visible(text: str) -> str:
    return "".join(_spelt(character) for character in text)


def _spelt(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥\t"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        code = ord(character)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    return character
