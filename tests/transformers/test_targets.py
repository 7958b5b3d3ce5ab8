"""Roles of transformers' modules: a sample of the sweep, and the facts that the sweep doesn't look at.

The whole sweep is `make sweep`: what a new release of transformers brings must not fail the tests of this package.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers import assert_same, state
from lora_adapters_transformers.backend import TransformersBackend
from lora_adapters_transformers.targets import TARGET_MAPS, UNVERIFIED
from torch import nn

import lora_adapters as la
from lora_adapters.errors import UnsupportedError
from lora_adapters.hooks.manager import plugins
from lora_adapters.hooks.specs import TargetMap
from lora_adapters.targets import Classification, ModelInfo, candidates

BACKEND = TransformersBackend()
SAMPLE = (
    ("llama", "causal-lm"), ("gpt2", "causal-lm"), ("bert", "sequence-classification"), ("t5", "seq2seq-lm"),
    ("bart", "seq2seq-lm"), ("mamba", "causal-lm"), ("qwen3_moe", "causal-lm"), ("gpt_neox", "causal-lm"),
    ("falcon", "causal-lm"), ("opt", "causal-lm"), ("deberta-v2", "sequence-classification"),
    ("distilbert", "sequence-classification"), ("gemma3", "causal-lm"), ("deepseek_v3", "causal-lm"),
    ("llava", "image-text-to-text"), ("qwen2_5_vl", "image-text-to-text"),
)  # fmt: skip


@pytest.fixture(scope="module")
def sweep():
    """The sweep's modules, importable while this file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield {name: importlib.import_module(f"sweep{name}") for name in ("_build", "_compare", "_trace")}


def _case(sweep, name: str, task: str):
    build = sweep["_build"]
    return next(c for c in build.cases((task,)) if c.name == name)


def _build(sweep, name: str, task: str) -> tuple[nn.Module, ModelInfo, Classification]:
    model = sweep["_build"].build(_case(sweep, name, task))
    return model, *_classify(model)


def _classify(model: nn.Module, maps: tuple[TargetMap, ...] = TARGET_MAPS) -> tuple[ModelInfo, Classification]:
    info = ModelInfo("transformers", BACKEND.family(model), candidates(model), model)
    return info, BACKEND.classify(info, maps)


@pytest.mark.parametrize("name, task", SAMPLE)
def test_roles_agree_with_the_forward_pass(sweep, name, task):
    outcome = sweep["_compare"].check(_case(sweep, name, task))
    assert (outcome.verdict, outcome.problems) == ("ok", []), outcome.detail
    assert outcome.attentions > 0 or name == "mamba"


@pytest.mark.parametrize(
    "pattern, role",
    [(r"q_proj$", "k"), (r"q_proj$", "mlp"), (r"o_proj$", "mlp"), (r"up_proj$", "v"), (r"lm_head$", "mlp")],
)
def test_the_oracle_sees_a_wrong_role(sweep, pattern, role):
    model, info, classes = _build(sweep, "llama", "causal-lm")
    seen = sweep["_trace"].trace(model, BACKEND.example_inputs(model, 1, 16, "meta"))
    compare = sweep["_compare"]
    assert compare.check_against_trace(model, info, classes, seen) == []
    wrong = replace(classes, roles={n: role if re.search(pattern, n) else r for n, r in classes.roles.items()})
    problems = compare.check_against_trace(model, info, wrong, seen)
    assert len(problems) == len([n for n in info.modules if re.search(pattern, n)])


def test_the_oracle_sees_a_weight_read_without_a_call(sweep):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.called = nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta")

        def forward(self, x):
            return self.called(nn.functional.linear(x, self.read.weight))

    seen = sweep["_trace"].trace(Reads(), {"x": torch.empty(2, 4, device="meta")})
    assert seen.read_directly == {"read.weight"}
    assert seen.inputs["called.weight"].sources == {"read.weight"}


def test_routers_and_experts_of_a_mixture(sweep):
    _, info, classes = _build(sweep, "qwen2_moe", "causal-lm")
    gates = {n: r for n, r in classes.roles.items() if n.endswith("gate")}
    assert set(gates.values()) == {"router"}
    assert {r for n, r in classes.roles.items() if "shared_expert." in n} == {"mlp"}
    experts = sum(p.numel() for n, p in info.model.named_parameters() if ".experts." in n)
    assert any(f"{experts:,}" in note and "target_parameters" in note for note in classes.notes)


def test_what_must_not_be_adapted(sweep):
    _, _, mamba = _build(sweep, "mamba", "causal-lm")
    assert mamba.default == "all-linear"
    assert {n.rpartition(".")[2] for n in mamba.never} == {"out_proj", "conv1d", "x_proj", "dt_proj"}
    _, _, gemma3 = _build(sweep, "gemma3", "causal-lm")
    inside_mha = {n: why for n, why in gemma3.never.items() if gemma3.roles[n] != "embedding"}
    assert set(inside_mha) == {"model.vision_tower.head.attention.out_proj"}
    assert all("MultiheadAttention" in why for why in inside_mha.values())
    with torch.device("meta"):
        _, blt = _classify(transformers.BltForCausalLM(sweep["_build"].small_config("blt", "causal-lm")))
    assert {n for n in blt.roles if n.startswith("model.patcher.")} == set(blt.never) != set()
    _, _, t5 = _build(sweep, "t5", "seq2seq-lm")
    assert not t5.never  # its source looks at wo.weight.dtype, and calls wo


@pytest.mark.parametrize(
    "name, task, kind, heads",
    [
        ("bert", "sequence-classification", "SEQ_CLS", ("classifier",)),
        ("deberta-v2", "sequence-classification", "SEQ_CLS", ("pooler", "classifier")),
        ("llama", "sequence-classification", "SEQ_CLS", ("score",)),
        ("bart", "sequence-classification", "SEQ_CLS", ("classification_head",)),
        ("layoutlm", "sequence-classification", "SEQ_CLS", ("classifier",)),
        ("llama", "causal-lm", "CAUSAL_LM", ()),
        ("marian", "seq2seq-lm", "SEQ_2_SEQ_LM", ()),
        ("bart", "causal-lm", "CAUSAL_LM", ()),
        ("llava", "image-text-to-text", "CAUSAL_LM", ()),
    ],
)
def test_task_and_heads(sweep, name, task, kind, heads):
    model, _, classes = _build(sweep, name, task)
    assert BACKEND.task_type(model) == kind
    assert BACKEND.heads_to_train(model) == heads
    linear = [n for n, m in candidates(model).items() if isinstance(m, nn.Linear)]
    assert all(classes.roles[n] == "head" for n in linear if n.split(".")[0] in heads)


@pytest.mark.parametrize(
    "class_name, kind",
    [
        ("BertForTokenClassification", "TOKEN_CLS"),
        ("BertForQuestionAnswering", "QUESTION_ANS"),
        ("BertModel", "FEATURE_EXTRACTION"),
        ("BertForMaskedLM", None),
    ],
)
def test_encoder_tasks_train_on_real_inputs(class_name, kind):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64
    )
    model = getattr(transformers, class_name)(config)
    assert BACKEND.task_type(model) == kind
    new = ("classifier",) if kind == "TOKEN_CLS" else ("qa_outputs",) if kind == "QUESTION_ANS" else ()
    assert BACKEND.heads_to_train(model) == new
    inputs = BACKEND.example_inputs(model, 3, 8, "cpu")
    assert inputs["input_ids"].shape == (3, 8)
    outputs = model(**inputs)
    if kind != "FEATURE_EXTRACTION":
        outputs.loss.backward()
        assert any(p.grad is not None for p in model.parameters())


def test_a_users_map_wins(sweep):
    model, _, plain = _build(sweep, "llama", "causal-lm")
    mine = TargetMap("transformers", ("llama",), roles={"other": (r"gate_proj$",)}, default="q+v")
    _, classes = _classify(model, (mine, *TARGET_MAPS))
    changed = {n for n in plain.roles if plain.roles[n] != classes.roles[n]}
    assert changed == {n for n in plain.roles if n.endswith("gate_proj")}
    assert classes.default == "q+v"


def test_layers_that_peft_wrapped_keep_their_roles(sweep):
    import peft

    model, _, before = _build(sweep, "llama", "causal-lm")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"])
    peft.inject_adapter_in_model(config, model)
    _, after = _classify(model)
    assert after.roles == before.roles


@pytest.fixture
def layoutlmv2():
    """The text part of LayoutLMv2: the whole needs detectron2."""
    from transformers.models.layoutlmv2 import modeling_layoutlmv2 as module

    class TextPart(module.LayoutLMv2PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.encoder = module.LayoutLMv2Encoder(config)

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, fast_qkv=False)
    return TextPart(transformers.LayoutLMv2Config(**sizes))


@pytest.mark.parametrize(
    "targets", ["auto", "attention", "attention+mlp", "q+v", "all-linear", {"attention": 4, "re:output": 8}]
)
def test_roles_that_nobody_checked_are_refused(layoutlmv2, targets):
    before = state(layoutlmv2)
    with pytest.raises(UnsupportedError, match=r"detectron2.* name the modules.*targets=\['"):
        la.attach(layoutlmv2, rank=2, targets=targets)
    with pytest.raises(UnsupportedError, match="name the modules"):
        la.attach(layoutlmv2, rank=2, targets=["query", "dense"], exclude=["mlp"])
    with pytest.raises(UnsupportedError, match="name the modules"):
        la.attach(layoutlmv2, r=2, target_modules="all-linear")
    assert_same(layoutlmv2, before)


@pytest.mark.parametrize(
    "options",
    [
        dict(targets=["query", "value"]),
        dict(targets="re:query$|value$"),
        dict(targets={"query": 2, "re:value$": 2}),
        dict(target_modules=["query", "value"]),
        dict(targets=["query", "key", "value"], exclude=["re:key$", "key"]),
    ],
)
def test_modules_named_by_hand_are_adapted_whatever_their_roles(layoutlmv2, options):
    adapter = la.attach(layoutlmv2, **{"rank": 2} | options)
    assert len(adapter.plan.layers) == 4
    assert {name.rpartition(".")[2] for name in adapter.layers} == {"query", "value"}


def test_a_map_or_a_hook_vouches_for_the_roles(layoutlmv2, monkeypatch):
    mine = TargetMap("transformers", ("layoutlmv2",), roles={"q": (r"query$",)})
    assert _classify(layoutlmv2)[1].unverified
    assert not _classify(layoutlmv2, (mine, *TARGET_MAPS))[1].unverified

    class Plugin:
        @la.hookimpl
        def lora_adapters_resolve_targets(self, info, request):
            return {name: "q" for name in info.modules if name.endswith("query")}

    plugins().register(Plugin(), name="mine")
    assert len(la.plan(layoutlmv2, rank=2, targets="q").layers) == 2


def test_every_family_that_is_refused_is_one_of_transformers():
    assert set(UNVERIFIED) <= set(transformers.CONFIG_MAPPING)


def test_shared_blocks_are_mentioned(sweep):
    model, _, _ = _build(sweep, "zamba", "causal-lm")
    assert any("share their weight" in note for note in la.plan(model, rank=2).notes)
