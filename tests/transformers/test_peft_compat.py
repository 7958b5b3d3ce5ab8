"""What is saved here loads in stock PEFT with identical outputs, and stock PEFT's checkpoints load here."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import llama, perturb
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer

import lora_adapters as la
from lora_adapters.layers.engine import EngineLayer


def seeded(make):
    torch.manual_seed(0)
    return make()


def gpt2():
    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=32, n_positions=32)
    return seeded(lambda: tf.GPT2LMHeadModel(config))


def t5():
    config = tf.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=32, decoder_start_token_id=0, pad_token_id=0
    )
    return seeded(lambda: tf.T5ForConditionalGeneration(config))


def bert_classifier():
    config = tf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=32, num_labels=3
    )
    return seeded(lambda: tf.BertForSequenceClassification(config))


def tied_llama():
    return llama(tie_word_embeddings=True)


@dataclass
class Case:
    """One model and one way to adapt it: as `attach` is asked here, and as stock PEFT is asked."""

    model: Any
    ours: dict[str, Any]
    theirs: dict[str, Any]


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "ranks and alphas per role": Case(
        llama,
        dict(targets={"attention": {"rank": 4, "alpha": 16}, "mlp": 2, "v": {"rank": 3, "alpha": 1}}),
        dict(
            task_type="CAUSAL_LM",
            target_modules=LINEAR,
            r=4,
            lora_alpha=16,
            rank_pattern={"v_proj": 3, "gate_proj": 2, r"layers\.1\.mlp\.up_proj": 5},
            alpha_pattern={"v_proj": 1, "q_proj": 7},
        ),
    ),
    "rank stabilised": Case(
        llama,
        dict(rank=4, alpha=8, use_rslora=True, targets="all-linear"),
        dict(task_type="CAUSAL_LM", r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear"),
    ),
    "DoRA": Case(
        llama,
        dict(rank=4, alpha=8, use_dora=True, targets="attention"),
        dict(task_type="CAUSAL_LM", r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "o_proj"]),
    ),
    "a bias of B": Case(
        llama,
        dict(rank=4, lora_bias=True, targets="attention"),
        dict(task_type="CAUSAL_LM", r=4, lora_bias=True, target_modules=["q_proj", "o_proj"]),
    ),
    "some layers": Case(
        llama,
        dict(rank=4, layers=[1], targets="mlp"),
        dict(task_type="CAUSAL_LM", r=4, target_modules=["up_proj"], layers_to_transform=[1]),
    ),
    "GPT-2": Case(
        gpt2,
        dict(rank=4, targets="all-linear"),
        dict(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    ),
    "GPT-2's biases": Case(
        gpt2,
        dict(rank=4, targets="attention", bias="lora_only"),
        dict(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only"),
    ),
    "tied embeddings and head": Case(
        tied_llama,
        dict(rank=4, targets=["embed_tokens", "lm_head", "q_proj"]),
        dict(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    ),
    "embeddings": Case(
        llama,
        dict(rank=4, targets="embedding+attention"),
        dict(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens", "q_proj"]),
    ),
    "modules trained whole": Case(
        llama,
        dict(rank=4, targets="attention", modules_to_save=["lm_head", "norm"]),
        dict(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    ),
    "a task head": Case(
        bert_classifier,
        dict(rank=4),
        dict(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]),
    ),
    "no task type": Case(
        bert_classifier,
        dict(rank=4),
        dict(r=4, target_modules=["query", "dense"], modules_to_save=["classifier"]),
    ),
    "encoder and decoder": Case(
        t5,
        dict(rank=4, targets="attention+mlp"),
        dict(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v", "wo"]),
    ),
}


def logits(model):
    model.eval()
    ids = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(9))
    extra = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def base(case, quantization):
    """Return the base model, quantized as `attach` does it."""
    model = case.model()
    if quantization is not None:
        la.attach(model, rank=2, quantization=quantization, **({"targets": "all-linear"})).detach()
    return model


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("name", CASES)
def test_ours_loads_in_stock_peft_and_here(name, quantization, tmp_path):
    case = CASES[name]
    adapter = la.attach(base(case, quantization), **case.ours)
    untrained = logits(adapter.model)
    perturb(adapter.model)
    expected = logits(adapter.model)
    assert not torch.allclose(expected, untrained, atol=1e-2)
    adapter.save(tmp_path / "a")

    theirs = PeftModel.from_pretrained(base(case, quantization), tmp_path / "a")
    assert not [m for m in theirs.modules() if isinstance(m, EngineLayer)]
    layers = {n for n, m in theirs.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert layers == set(adapter.layers)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    again = la.restore(base(case, quantization), tmp_path / "a")
    torch.testing.assert_close(logits(again.model), expected, rtol=0, atol=0)
    assert {x.name: (x.rank, x.alpha) for x in again.plan.layers} == {
        x.name: (x.rank, x.alpha) for x in adapter.plan.layers
    }
    again.save(tmp_path / "b")
    assert (tmp_path / "b/adapter_model.safetensors").stat().st_size > 0
    third = PeftModel.from_pretrained(base(case, quantization), tmp_path / "b")
    torch.testing.assert_close(logits(third), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("name", CASES)
def test_stock_peft_loads_here(name, quantization, tmp_path):
    case = CASES[name]
    theirs = get_peft_model(base(case, quantization), LoraConfig(**case.theirs))
    assert not [m for m in theirs.modules() if isinstance(m, EngineLayer)]
    untrained = logits(theirs)
    perturb(theirs)
    expected = logits(theirs)
    assert not torch.allclose(expected, untrained, atol=1e-2)
    theirs.save_pretrained(tmp_path / "a")
    adapter = la.restore(base(case, quantization), tmp_path / "a")
    assert any(isinstance(m, EngineLayer) for m in adapter.model.modules())
    torch.testing.assert_close(logits(adapter.model), expected, rtol=0, atol=1e-5)
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in adapter.parameters()) == trainable


def test_the_saved_config_names_the_base_as_stock_peft_does(tmp_path):
    named = tmp_path / "base"
    llama().save_pretrained(named)
    theirs = get_peft_model(la.load(str(named), device="cpu"), LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = la.attach(la.load(str(named), device="cpu"), rank=2)
    ours.save(tmp_path / "ours")
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    assert [config["base_model_name_or_path"] for config in configs] == [str(named)] * 2
    odd = tmp_path / "a\nb"
    llama().save_pretrained(odd)
    nameless = la.attach(la.load(str(odd), device="cpu"), rank=2)
    nameless.save(tmp_path / "nameless")
    la.restore(llama(), tmp_path / "nameless")
    made = la.merge_checkpoint(None, tmp_path / "ours", tmp_path / "merged")
    assert (made.base, made.base_from) == (str(named), "adapter")
