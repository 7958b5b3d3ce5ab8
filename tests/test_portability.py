"""Verdicts on where an adapter loads. Those for PEFT are compared with what stock PEFT does."""

import json
import os
import warnings

import pytest
import torch
from helpers import llama, net, perturb, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_adapters as la
from lora_adapters.adapter_config import CONFIG_NAME
from lora_adapters.adapter_file import inspect_adapter
from lora_adapters.errors import CheckpointError, LoraAdaptersWarning
from lora_adapters.portability import judge

IDS = torch.arange(3, 11)[None]


class Twice(nn.Module):
    """A linear layer under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.ModuleDict({"lin": nn.Linear(8, 8)})
        self.b = nn.ModuleDict({"lin": self.a["lin"]})

    def forward(self, x):
        return self.b["lin"](torch.tanh(self.a["lin"](x)))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(8, 8, 3)

    def forward(self, x):
        return self.conv(x)


def output(model, inputs):
    with torch.no_grad():
        out = model.eval()(inputs)
    return getattr(out, "logits", out)


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- PEFT -----------------------------------------------------------------------------------------------------------

#: What is attached -> model, inputs, arguments, and whether stock PEFT gets the same from the file.
PEFT_CASES = {
    "plain": (llama, IDS, dict(rank=4, targets="attention"), True),
    "ranks": (llama, IDS, dict(targets={"attention": {"rank": 4, "alpha": 9}, "mlp": 2}), True),
    "DoRA": (llama, IDS, dict(rank=4, use_dora=True, targets="attention"), True),
    "bias of B": (llama, IDS, dict(rank=4, lora_bias=True, targets="attention"), True),
    "embedding": (llama, IDS, dict(rank=4, targets="embedding+q"), True),
    "PiSSA": (llama, IDS, dict(rank=4, init_lora_weights="pissa", targets="attention"), True),
    "trained whole": (llama, IDS, dict(rank=4, targets="q", modules_to_save=["lm_head"]), True),
    "convolution": (Conv, torch.ones(1, 8, 5), dict(rank=4, targets="conv"), True),
    "convolution with groups": (net, tokens(), dict(rank=4, targets=["conv"]), False),
    "DoRA on a convolution with groups": (net, tokens(), dict(rank=4, use_dora=True, targets=["conv"]), True),
    "one module twice": (Twice, torch.ones(1, 8), dict(rank=4, targets=["lin"]), False),
}


@pytest.mark.parametrize("build, inputs, request_, same", PEFT_CASES.values(), ids=PEFT_CASES)
@pytest.mark.filterwarnings("ignore")
def test_for_peft_is_what_stock_peft_does(tmp_path, build, inputs, request_, same):
    adapter = la.attach(build(), **request_)
    perturb(adapter.model)
    adapter.save(tmp_path)
    ours = output(adapter.model, inputs)
    try:
        loaded = PeftModel.from_pretrained(build(), tmp_path)
    except RuntimeError:
        assert not same
    else:
        assert torch.allclose(output(loaded, inputs), ours, atol=1e-5) == same
    with torch.device("meta"):
        skeleton = build()
    verdict = judge(inspect_adapter(tmp_path), "peft", skeleton)
    assert verdict.loads == same, verdict.reasons


@pytest.mark.parametrize(
    "changes, loads",
    [
        ({"init_lora_weights": "corda"}, False),
        ({"init_lora_weights": "loftq", "loftq_config": {}}, False),
        ({"init_lora_weights": "gaussian"}, True),
        ({"init_lora_weights": "orthogonal"}, True),
        ({"alora_invocation_tokens": [5]}, True),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_asks_of_the_config(tmp_path, changes, loads):
    get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    try:
        PeftModel.from_pretrained(llama(), tmp_path)
    except ValueError:
        assert not loads
    else:
        assert loads
    assert judge(inspect_adapter(tmp_path), "peft").loads == loads


def test_saving_a_convolution_with_groups_warns(tmp_path):
    model = net()
    adapter = la.attach(model, rank=4, targets=["conv", "head"])
    perturb(model)
    with pytest.warns(LoraAdaptersWarning, match=r"'conv' is a convolution with groups.*lora_adapters.restore"):
        adapter.save(tmp_path)
    # If this fails, PEFT has the same form by now, and the warning can go.
    with pytest.raises(RuntimeError, match=r"size mismatch for .*conv\.lora_A"):
        PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(output(la.restore(net(), tmp_path).model, tokens()), output(model, tokens()))


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (net, dict(targets=["head", "emb"])),
        (net, dict(targets=["conv"], use_dora=True)),  # PEFT's own layer
        (Conv, dict(targets="conv")),
    ],
)
def test_saving_what_stock_peft_can_load_does_not_warn(tmp_path, build, options):
    model = build()
    adapter = la.attach(model, rank=4, **options)
    perturb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraAdaptersWarning)
        adapter.save(tmp_path)
    inputs = tokens() if build is net else torch.ones(1, 8, 5)
    torch.testing.assert_close(output(PeftModel.from_pretrained(build(), tmp_path), inputs), output(model, inputs))


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("settings", [dict(groups=4), dict(groups=2, bias=False, stride=2), dict(groups=1)])
@pytest.mark.filterwarnings("ignore")
def test_restore_takes_dora_on_convolutions_as_save_wrote_it(tmp_path, conv, settings):
    """PEFT's own layer, whose factors have other shapes than ours where there are groups."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(conv(8, 16, 3, **settings))

    inputs = torch.linspace(-1, 1, 8 * 5 * 5).view(1, 8, 5, 5) if conv is nn.Conv2d else torch.ones(1, 8, 5)
    adapter = la.attach(build(), rank=4, use_dora=True, targets=["0"])
    perturb(adapter.model)
    adapter.save(tmp_path)
    restored = la.restore(build(), tmp_path)
    assert torch.equal(output(restored.model, inputs), output(adapter.model, inputs))
    assert not torch.allclose(output(build(), inputs), output(adapter.model, inputs))
    # Another base is still another base.
    with pytest.raises(CheckpointError, match="has shape"):
        la.restore(nn.Sequential(conv(16, 16, 3, **settings)), tmp_path)
    assert not judge(inspect_adapter(tmp_path), "peft").notes


@pytest.mark.filterwarnings("ignore:.*convolution with groups.*")
def test_a_convolution_without_its_base_is_noted(tmp_path):
    la.attach(net(), rank=4, targets=["conv"]).save(tmp_path)
    verdict = judge(inspect_adapter(tmp_path), "peft")
    assert verdict.loads
    assert "groups" in verdict.notes[0]


def test_an_interrupted_save(tmp_path, monkeypatch):
    """Weights in place, their config not yet: only this package finds it."""
    la.attach(llama(), rank=4, targets="q").save(tmp_path)
    (tmp_path / "other").write_text("so that the folder is written into, not replaced")
    replace, calls = os.replace, []

    def failing(*names):
        calls.append(names)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return replace(*names)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(CheckpointError, match="new weights are in place"):
        la.attach(llama(), rank=2, targets="q").save(tmp_path)
    monkeypatch.undo()
    file = inspect_adapter(tmp_path)
    assert {module.rank for module in file.modules.values()} == {2}
    for target in ("peft", "vllm"):
        assert "interrupted" in judge(file, target).reasons[0]


# ---- vLLM: its rules, by its source (0.33) --------------------------------------------------------------------------


def verdict_of(folder, max_lora_rank=16, changes=None, model=None, **fields):
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | fields
    get_peft_model(model or llama(), LoraConfig(**fields)).save_pretrained(folder)
    edit_config(folder, **(changes or {}))
    return judge(inspect_adapter(folder), "vllm", max_lora_rank=max_lora_rank)


def classifier(**settings):
    from transformers import AutoModelForSequenceClassification, RobertaConfig

    if settings:
        return AutoModelForSequenceClassification.from_config(RobertaConfig(**settings))
    return AutoModelForSequenceClassification.from_config(llama().config)


VLLM_YES = {
    "plain": dict(),
    "rank-stabilised": dict(use_rslora=True),
    "ranks": dict(rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3}),
    "rank as allowed": dict(r=16),
    "the rank it is started with": dict(r=24, max_lora_rank=32),
    "Gaussian start": dict(init_lora_weights="gaussian"),
    "head and embedding": dict(target_modules=["embed_tokens", "lm_head", "q_proj"]),
}


@pytest.mark.parametrize("fields", VLLM_YES.values(), ids=VLLM_YES)
@pytest.mark.filterwarnings("ignore")
def test_vllm_takes(tmp_path, fields):
    verdict = verdict_of(tmp_path, **fields)
    assert verdict.loads, verdict.reasons


VLLM_NO = {
    "DoRA": (dict(use_dora=True), "DoRA"),
    "bias of B": (dict(lora_bias=True), "lora_bias"),
    "bias": (dict(bias="all"), "trained biases"),
    "tokens": (dict(trainable_token_indices=[1]), "token rows"),
    "rank": (dict(r=17), "--max-lora-rank 32"),
    "rank of a pattern": (dict(rank_pattern={"v_proj": 20}), "rank 20"),
    "rank above all": (dict(rank_pattern={"v_proj": 513}), "any vLLM engine"),
    "PiSSA": (dict(init_lora_weights="pissa"), "pissa"),
    "aLoRA": (dict(changes={"alora_invocation_tokens": [3]}), "activated LoRA"),
    "LoRA-GA": (dict(changes={"init_lora_weights": "lora_ga"}), "lora_ga"),
    "trained whole": (dict(modules_to_save=["lm_head"]), "'lm_head'"),
}


@pytest.mark.parametrize("fields, reason", VLLM_NO.values(), ids=VLLM_NO)
@pytest.mark.filterwarnings("ignore")
def test_vllm_refuses(tmp_path, fields, reason):
    verdict = verdict_of(tmp_path, **fields)
    assert not verdict.loads
    (found,) = verdict.reasons
    assert reason in found


@pytest.mark.filterwarnings("ignore")
def test_vllm_takes_one_plain_head(tmp_path):
    one = verdict_of(tmp_path / "one", model=classifier(), task_type="SEQ_CLS")
    assert one.loads, one.reasons
    assert "heads" in one.notes[-1]
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40)
    deep = verdict_of(tmp_path / "deep", model=classifier(**sizes), task_type="SEQ_CLS", target_modules=["query"])
    assert "classifier.dense" in deep.reasons[0]


@pytest.mark.filterwarnings("ignore")
def test_vllm_and_other_layers(tmp_path):
    get_peft_model(Conv(), LoraConfig(r=4, target_modules=["conv"])).save_pretrained(tmp_path / "conv")
    assert "'conv' is a convolution" in judge(inspect_adapter(tmp_path / "conv"), "vllm").reasons[0]
    la.attach(Twice(), rank=4, targets=["lin"]).save(tmp_path / "twice")
    assert "several places" in judge(inspect_adapter(tmp_path / "twice"), "vllm").reasons[0]


@pytest.mark.filterwarnings("ignore")
def test_what_older_vllm_gets_wrong_is_noted(tmp_path):
    assert any("one scale" in note for note in verdict_of(tmp_path / "a", rank_pattern={"v_proj": 2}).notes)
    assert not any("one scale" in note for note in verdict_of(tmp_path / "b").notes)
