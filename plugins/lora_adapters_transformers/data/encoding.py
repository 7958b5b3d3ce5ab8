"""Texts to tokens and labels, one function per task. Each has a check of the columns that needs no tokenizer."""

from lora_adapters_transformers.data.causal import CausalForm, check_causal, encode_causal
from lora_adapters_transformers.data.encoded import Encoded

__all__ = ["CausalForm", "Encoded", "check_causal", "encode_causal"]
