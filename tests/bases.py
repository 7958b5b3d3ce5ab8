"""Tiny base models with tokenizers, and data, on disk: for tests that run the real commands on them."""

import json
import random
from pathlib import Path

import torch
from helpers import llama
from small_tokenizers import CHATML, make_tokenizer


def llama_base(folder: Path, chat_template: str | None = CHATML) -> str:
    """The Llama of `helpers.llama` with a ChatML tokenizer, and positions for whole chats; returns its folder."""
    tokenizer = make_tokenizer(folder, chat_template=chat_template, eos_token="<|im_end|>")
    llama(vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=4).save_pretrained(folder)
    return str(folder)


def bert_base(folder: Path) -> str:
    """A two-layer Bert without a head."""
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer(folder, bos=True)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def t5_base(folder: Path) -> str:
    """A two-layer T5."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = make_tokenizer(folder, eos=True)
    torch.manual_seed(0)
    config = T5Config(
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        vocab_size=len(tokenizer),
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict]) -> str:
    """Write JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count: int = 64) -> list[dict]:
    """Questions and answers of small sums, in a fixed random order."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(pairs)
    return [{"question": f"What is {a} plus {b}?", "answer": str(a + b)} for a, b in pairs[:count]]


def seasons(count: int = 64) -> list[dict]:
    """Texts whose label a tiny model can learn: the word decides."""
    words = [("cold", "winter"), ("snow", "winter"), ("heat", "summer"), ("sun", "summer")]
    return [{"text": f"number {i} is about {words[i % 4][0]}", "label": words[i % 4][1]} for i in range(count)]


def preferences(count: int = 64) -> list[dict]:
    """Prompts with a right answer and a refusal."""
    return [{"prompt": r["question"], "chosen": r["answer"], "rejected": "I do not know."} for r in sums(count)]


def write_recipe(path: Path, **sections) -> str:
    """Write a recipe as YAML; returns the path."""
    import yaml

    path.write_text(yaml.safe_dump({"schema": 1, **sections}, sort_keys=False), encoding="utf-8")
    return str(path)
