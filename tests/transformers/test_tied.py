"""Models of transformers whose layers share weights: adapted, merged, saved and loaded again, tied again."""

import copy
import itertools

import pytest
import torch
import transformers
from helpers import llama, perturb
from peft import PeftModel
from torch import nn
from torch.func import functional_call

import lora_adapters as la
from lora_adapters.inject import base_of
from lora_adapters.weights import store_for

IDS = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(0))
_HYBRID = dict(
    vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2,
    num_attention_heads=4, num_key_value_heads=4, mamba_d_state=8, use_mamba_kernels=False, initializer_range=0.2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def tied_llama():
    return llama(tie_word_embeddings=True)


def t5():
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=40, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def switch():
    """Its forward pass reads config.tie_word_embeddings."""
    config = transformers.SwitchTransformersConfig(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=4, vocab_size=40, num_experts=2,
        num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


def zamba():
    config = transformers.ZambaConfig(**_HYBRID, attention_hidden_size=128, attention_head_dim=32, n_mamba_heads=2)
    return transformers.ZambaForCausalLM(config)


def zamba2():
    config = transformers.Zamba2Config(
        **_HYBRID, n_mamba_heads=4, mamba_headdim=32, adapter_rank=4, use_shared_mlp_adapter=True, num_mem_blocks=1
    )
    return transformers.Zamba2ForCausalLM(config)


#: Model, what is adapted, and what config.tie_word_embeddings must say once that is merged.
MODELS = [
    (tied_llama, ["lm_head"], False),
    (tied_llama, ["embed_tokens"], False),
    (tied_llama, ["embed_tokens", "lm_head"], False),
    (tied_llama, "auto", True),
    (t5, ["lm_head"], True),
    (t5, ["shared", "lm_head"], False),
    (t5, "auto", True),
    (switch, ["lm_head"], True),
    (zamba, "attention+mlp", True),
    (zamba, ["layers.1.shared_transf.self_attn.q_proj"], True),
    (zamba, ["layers.3.shared_transf.self_attn.q_proj"], True),
    (zamba, ["q_proj", "lm_head"], True),
    (zamba2, "all-linear", True),
    (zamba2, ["q_proj", "lm_head"], True),
]
every_model = pytest.mark.parametrize(
    ("make", "targets", "flag"), MODELS, ids=[f"{make.__name__}-{targets}" for make, targets, _ in MODELS]
)


def build(make):
    torch.manual_seed(0)
    return make().eval()


def logits(model):
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **decoder).logits


def dense(base, adapter):
    """The base model's logits with W + BA in place of each adapted weight."""
    weights = {}
    for name, layer in adapter.layers.items():
        a, b = (p.detach() for p in layer.factor_parameters(adapter.name))
        module = base.get_submodule(name)
        delta = b.flatten(1) @ a.flatten(1)
        if isinstance(module, nn.Embedding):
            delta = delta.T
        weights[f"{name}.weight"] = module.weight.detach() + delta.view_as(module.weight)
    decoder = {"decoder_input_ids": IDS} if base.config.is_encoder_decoder else {}
    with torch.no_grad():
        return functional_call(base, weights, (), {"input_ids": IDS, **decoder}, tie_weights=False).logits


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


@every_model
def test_merged_saved_and_tied_again_it_computes_the_same(make, targets, flag, tmp_path):
    base = build(make)
    model = copy.deepcopy(base)
    adapter = la.attach(model, rank=2, targets=targets)
    perturb(model)
    expected = dense(base, adapter)
    assert not torch.allclose(logits(base), expected, atol=1e-3)
    with torch.no_grad():
        close(logits(model), expected)
        adapter.merge()
        close(logits(model), expected)
        adapter.unmerge()
        close(logits(model), expected)
        assert adapter.merge(unload=True) is model
        close(logits(model), expected)
        assert model.config.tie_word_embeddings is flag
        model.save_pretrained(tmp_path)
        close(logits(type(model).from_pretrained(tmp_path)), expected)
        model.tie_weights()
        close(logits(model), expected)
        model.save_pretrained(tmp_path / "again")
        close(logits(type(model).from_pretrained(tmp_path / "again")), expected)


@every_model
def test_taken_off_it_is_tied_as_before(make, targets, flag):
    model, base = build(make), build(make)
    adapter = la.attach(model, rank=2, targets=targets)
    perturb(model)
    adapter.merge()
    adapter.detach()
    assert model.config.to_dict() == base.config.to_dict()
    names = {id(p): n for n, p in base.named_parameters()}
    for (name, mine), (_, theirs) in zip(
        model.named_parameters(remove_duplicate=False), base.named_parameters(remove_duplicate=False), strict=True
    ):
        assert torch.equal(mine, theirs), name
        assert model.get_parameter(names[id(theirs)]) is mine, name
    model.tie_weights()
    close(logits(model), logits(base))


@every_model
def test_stock_peft_agrees(make, targets, flag, tmp_path):
    model = build(make)
    adapter = la.attach(model, rank=2, targets=targets)
    perturb(model)
    adapter.save(tmp_path)
    close(logits(PeftModel.from_pretrained(build(make), str(tmp_path)).base_model.model), logits(model))
    again = build(make)
    la.restore(again, tmp_path)
    close(logits(again), logits(model))


@pytest.mark.parametrize("make", [zamba, zamba2])
def test_blocks_in_nf4_keep_what_they_share(make):
    dense_base, model = build(make), build(make)
    adapter = la.attach(model, rank=2, targets="all-linear", quantization="nf4")
    perturb(model)
    assert adapter.plan.quantize
    assert not any("shared_transf" in name and ".weight" in name for name in _packed(model))
    for name in adapter.plan.quantize:
        weight = store_for(base_of(model.get_submodule(name))).read()
        dense_base.get_submodule(name).weight.data.copy_(weight)
    expected = dense(dense_base, adapter)
    with torch.no_grad():
        close(logits(model), expected, atol=1e-3)
        adapter.merge()
        close(logits(model), expected, atol=1e-3)
        adapter.unmerge()
        close(logits(model), expected, atol=1e-3)
        adapter.detach()
    # Every block still has the first one's weights.
    blocks = [m for n, m in model.named_modules() if n.endswith(("shared_transf", "shared_transformer"))]
    for one, other in itertools.pairwise(blocks):
        assert one.self_attn.q_proj.weight is other.self_attn.q_proj.weight


def _packed(model):
    return [n for n, p in model.named_parameters() if getattr(p, "quant_state", None) is not None]


def test_more_words_after_merging_do_not_bring_the_old_head_back():
    model = build(tied_llama)
    adapter = la.attach(model, rank=2, targets=["lm_head"])
    perturb(model)
    adapter.merge(unload=True)
    with torch.no_grad():
        expected = logits(model)
        model.resize_token_embeddings(40, mean_resizing=False)
        close(logits(model)[..., :32], expected)
