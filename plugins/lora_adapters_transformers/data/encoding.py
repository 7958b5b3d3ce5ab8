"""Texts to tokens and labels, one function per task. Each has a check of the columns that needs no tokenizer."""

from lora_adapters_transformers.data.causal import CausalForm, check_causal, encode_causal
from lora_adapters_transformers.data.classification import check_classification, encode_classification
from lora_adapters_transformers.data.encoded import Encoded
from lora_adapters_transformers.data.reward import check_reward, encode_reward
from lora_adapters_transformers.data.seq2seq import check_seq2seq, encode_seq2seq

__all__ = [
    "CausalForm",
    "Encoded",
    "check_causal",
    "check_classification",
    "check_reward",
    "check_seq2seq",
    "encode_causal",
    "encode_classification",
    "encode_reward",
    "encode_seq2seq",
]
