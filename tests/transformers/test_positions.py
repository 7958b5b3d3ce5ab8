"""The most tokens a model has positions for: one token more fails, so a recipe that asks for it is refused."""

import pytest
import torch
import transformers as tf
from lora_adapters_transformers.training.positions import limits

import lora_adapters as la

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
PAIR = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=32)  # fmt: skip
ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)

LEARNT = {
    "GPT-2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=20, **ENDS)
    ),
    "GPT-Neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]], vocab_size=32,
                        max_position_embeddings=20, **ENDS)
    ),
    "OPT": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, vocab_size=32,
                     max_position_embeddings=20, word_embed_proj_dim=16)
    ),
    "BERT": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES, max_position_embeddings=20)),
    "RoBERTa": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**SIZES, max_position_embeddings=22)),
    "DistilBERT": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=32, max_position_embeddings=20)
    ),
    "BART": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**PAIR, max_position_embeddings=20)),
    "Marian": lambda: tf.MarianMTModel(
        tf.MarianConfig(**PAIR, max_position_embeddings=20, pad_token_id=3, eos_token_id=0, decoder_start_token_id=3)
    ),
}  # fmt: skip


def run(model, row, target=3):
    ids = torch.full((1, row), 5)
    pair = {"decoder_input_ids": torch.full((1, target), 5)} if model.config.is_encoder_decoder else {}
    model(input_ids=ids, **pair)


@pytest.mark.parametrize("name", list(LEARNT))
def test_the_limit_is_where_the_model_fails(name):
    model = LEARNT[name]()
    rows, targets = limits(model)
    assert rows == 20
    run(model, rows)
    with pytest.raises((IndexError, RuntimeError)):
        run(model, rows + 1)
    assert (targets is not None) == model.config.is_encoder_decoder
    if targets is not None:
        run(model, 3, targets)
        with pytest.raises((IndexError, RuntimeError)):
            run(model, 3, targets + 1)


def test_an_adapter_on_the_table_changes_nothing():
    model = LEARNT["GPT-2"]()
    adapter = la.attach(model, rank=2, targets=["wpe", "c_attn"])
    assert limits(adapter.model) == (20, None)


@pytest.mark.parametrize(
    "model",
    [
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, max_position_embeddings=20)),
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0)
        ),
    ],
)
def test_positions_that_are_computed_have_no_end(model):
    model = model()
    assert limits(model) == (None, None)
    run(model, 21, 21)
