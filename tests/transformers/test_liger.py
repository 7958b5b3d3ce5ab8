"""Liger's kernels without a GPU: when they are refused, what is bound to a model, and that all of it goes again."""

import copy
import functools
import gc
import pickle
import sys

import pytest
import torch
from helpers import assert_same, llama, net, state

import lora_adapters as la
from lora_adapters.base_kernels import with_kernels
from lora_adapters.errors import MissingDependencyError, RequestError, UnsupportedError

pytest.importorskip("liger_kernel")

from lora_adapters_transformers import liger
from transformers.models.llama import modeling_llama

IDS = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
SMALL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def build(family, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | options))


def bound(model):
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def process():
    """What Liger's own patching changes for every model."""
    shared = [torch.nn, torch.nn.functional, torch.nn.CrossEntropyLoss, torch.nn.LayerNorm]
    shared += [m for n, m in sys.modules.items() if n.startswith("transformers.models.") and ".modeling_" in n]
    return {(getattr(o, "__name__", o), key): value for o in shared for key, value in vars(o).items()}


def changed(before):
    now = process()
    return {key for key, value in before.items() if now[key] is not value}


def kernels_for(model, **options):
    """Return the kernels of a model that is on the CPU, where each bound forward takes the model's own."""
    plan = la.plan(model, rank=2, **options)
    return liger.LigerKernels(model, plan, liger._patch_function(model))


@pytest.fixture
def any_device(monkeypatch):
    monkeypatch.setattr(liger, "DEVICES", ("cpu",))


def test_auto_on_a_cpu_says_why_and_changes_nothing():
    model = llama()
    before, own = state(model), process()
    adapter = la.attach(model, rank=2, liger="auto")
    assert "no Liger kernels: Liger's kernels run on CUDA and XPU devices" in " ".join(adapter.summary().split())
    assert bound(model) == set()
    assert changed(own) == set()
    adapter.detach()
    assert_same(model, before)


def test_true_is_refused_before_anything_changes():
    model, plain = llama(), net()
    before = state(model)
    with pytest.raises(UnsupportedError, match="on cpu"):
        la.attach(model, rank=2, quantization="nf4", liger=True)
    assert_same(model, before)
    with pytest.raises(UnsupportedError, match="no kernels for models of the generic backend"):
        la.attach(plain, rank=2, targets=["head"], liger=True)
    with pytest.raises(RequestError, match="liger must be"):
        la.attach(model, rank=2, liger="yes")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(MissingDependencyError, match=r"lora-adapters\[liger\]"):
        la.attach(llama(), rank=2, liger=True)
    assert "needs" not in la.attach(llama(), rank=2).summary()
    assert "pip install" in la.attach(llama(), rank=2, liger="auto").summary()


def test_restore_takes_it_too(tmp_path):
    la.attach(llama(), rank=2).save(tmp_path)
    model = llama()
    with pytest.raises(UnsupportedError, match="on cpu"):
        la.restore(model, tmp_path, liger=True)
    with pytest.raises(RequestError, match="liger must be"):
        la.restore(model, tmp_path, liger=1.5)
    assert "no Liger kernels" in la.restore(model, tmp_path, liger="auto").summary()


@pytest.mark.usefixtures("any_device")
def test_models_that_liger_does_not_know():
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16))
    with pytest.raises(UnsupportedError, match="no kernels for model type 'gpt2'"):
        la.attach(gpt2, rank=2, liger=True)

    class Mine(type(llama())):
        pass

    with pytest.raises(UnsupportedError, match="own model classes only, not Mine"):
        la.attach(Mine(llama().config), rank=2, liger=True)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"])
def test_kernels_are_bound_to_the_one_model_and_taken_off(family):
    model, other = build(family), build(family)
    other_classes = {type(module) for module in other.modules()}
    inputs = {"input_ids": IDS, "labels": IDS}
    expected = model.train()(**inputs)
    before, own = state(model), process()
    kernels = kernels_for(model)
    notes = kernels.apply()
    assert "fused linear cross entropy" in notes[0]
    assert "norm" in notes[0]
    assert "MLP" in notes[0]
    assert len(notes) == 1
    norms = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    assert bound(model) == {"", *norms, *(n for n, _ in model.named_modules() if n.endswith("mlp"))}
    assert bound(other) == set()
    assert {key for _, key in changed(own)} == {"apply_rotary_pos_emb"}
    assert {type(module) for module in build(family).modules()} == other_classes
    # On a CPU each of them is the model's own.
    assert torch.equal(model(**inputs).loss, expected.loss)
    assert torch.equal(model(**inputs).logits, expected.logits)
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected.logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, expected.logits)
    model.to("meta")(input_ids=IDS.to("meta"))
    kernels.revert()
    assert bound(model) == set()
    assert changed(own) == set()
    assert state(model)["names"] == before["names"]
    kernels.revert()


def test_the_last_model_gives_the_rotary_embedding_back():
    own = modeling_llama.apply_rotary_pos_emb
    models = [llama(), llama(), llama()]
    first, second, third = (kernels_for(model) for model in models)
    for kernels in (first, second, third):
        kernels.apply()
    del kernels
    first.revert()
    assert modeling_llama.apply_rotary_pos_emb is not own
    second.revert()
    assert modeling_llama.apply_rotary_pos_emb is not own
    # The third one is let go with its kernels on.
    models.clear()
    del third
    gc.collect()
    assert modeling_llama.apply_rotary_pos_emb is own


def test_adapters_of_one_model_share_the_kernels():
    model = llama()
    first, second = kernels_for(model), kernels_for(model)
    assert first.apply() == second.apply()
    everything = bound(model)
    first.revert()
    assert bound(model) == everything
    second.revert()
    assert bound(model) == set()


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(targets="attention+head"), "pass over its adapter"),
        (dict(modules_to_save=["lm_head"]), "trained whole"),
    ],
)
def test_the_fused_loss_never_passes_over_a_head_that_is_adapted(options, reason):
    model = llama()
    kernels = kernels_for(model, **options)
    assert reason in kernels.apply()[1]
    assert "" not in bound(model)
    kernels.revert()


def test_a_head_that_is_adapted_later_is_seen_at_the_next_call():
    model = llama()
    kernels = kernels_for(model)
    kernels.apply()
    assert not liger._not_now(model)
    adapter = la.attach(model, rank=2, targets="head")
    assert "no plain nn.Linear" in liger._not_now(model)
    adapter.detach()
    assert not liger._not_now(model)
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert "hooks" in liger._not_now(model)
    handle.remove()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(32))
    assert "bias" in liger._not_now(model)
    model.lm_head.bias = None
    model.loss_function = lambda *_, **__: torch.zeros(())
    assert "loss function" in liger._not_now(model)
    kernels.revert()


def test_half_precision_and_quantized_heads_keep_their_loss():
    assert "scaled" in kernels_for(llama().half()).apply()[1]
    plan = la.plan(llama(), rank=2)
    assert "quantized" in liger._why_not_the_loss(
        model := llama(), type(plan)(**{**vars(plan), "quantize": {"lm_head": "nf4"}})
    )
    assert liger._why_not_the_loss(model, plan) == ""


def test_what_liger_takes_for_granted_is_checked():
    from transformers import LlamaForSequenceClassification

    model = llama(hidden_act="gelu")
    notes = kernels_for(model).apply()
    assert notes[1] == "Liger's MLP kernel is left out for LlamaMLP: its activation is another"
    assert not any(name.endswith("mlp") for name in bound(model))
    classifier = LlamaForSequenceClassification(llama().config)
    kernels = kernels_for(classifier)
    assert "is no language model" in kernels.apply()[1]
    assert "" not in bound(classifier)
    assert "model.norm" in bound(classifier)


def test_a_forward_that_other_code_replaced_stays():
    model = llama()
    theirs = model.model.norm.forward = model.model.norm.forward
    kernels = kernels_for(model)
    assert "other code has replaced its forward" in " ".join(kernels.apply())
    assert model.model.norm.forward is theirs
    # And one that a trainer puts around ours.
    ours = model.forward
    wrapper = model.forward = functools.partial(ours, use_cache=False)
    kernels.revert()
    assert model.forward is wrapper
    assert bound(model) == {"", "model.norm"}


def test_experts_keep_their_forward():
    model = build("mixtral", num_local_experts=2)
    notes = kernels_for(model, targets="attention").apply()
    assert any("experts kernel is left out" in note for note in notes)
    assert not any(name.endswith("experts") for name in bound(model))


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("end", ["detach", "unload"])
def test_attach_and_its_ends(end):
    model, own = llama(), modeling_llama.apply_rotary_pos_emb
    before = state(model)
    adapter = la.attach(model, rank=2, liger=True, modules_to_save=["norm"])
    words = " ".join(adapter.summary().split())
    assert "Liger's kernels: fused linear cross entropy, 2 x MLP, rotary embedding" in words
    # Without a GPU its norm can't run: tried before it is trusted, it is left out.
    assert "Liger's norm kernel is left out for LlamaRMSNorm: its kernel fails" in words
    if end == "detach":
        adapter.detach()
        assert_same(model, before)
    else:
        adapter.merge(unload=True)
    assert bound(model) == set()
    assert modeling_llama.apply_rotary_pos_emb is own


@pytest.mark.usefixtures("any_device")
def test_a_failure_after_them_takes_them_off():
    model, own = llama(), process()
    before = state(model)
    plan = la.plan(model, rank=2, liger=True)
    with pytest.raises(ZeroDivisionError), with_kernels(model, plan) as (noted, _):
        assert len(noted.notes) > len(plan.notes)
        assert bound(model)
        raise ZeroDivisionError
    assert_same(model, before)
    assert changed(own) == set()
