"""`load`: transformers' own loading, the same weights as `attach` quantizes, and refusals before weights are read."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import llama
from torch import nn

import lora_adapters as la
from lora_adapters.errors import DoesNotFitError, LoraAdaptersError, RequestError
from lora_adapters.weights import quantized_format, store_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return str(path)


def stores(model):
    found = {n: store_for(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {n: s for n, s in found.items() if s is not None}


@pytest.mark.parametrize("fmt", ["nf4", "fp4", "int8"])
def test_load_and_attach_quantize_the_same_layers_to_the_same_weights(folder, fmt):
    loaded = la.load(folder, quantization=fmt)
    attached = la.load(folder)
    la.attach(attached, rank=2, quantization=fmt)
    la.attach(loaded, rank=2)
    ours, theirs = stores(attached), stores(loaded)
    bases = {n for n in ours if "lora_" not in n}
    assert {n: ours[n].format for n in bases} == {n: theirs[n].format for n in theirs if "lora_" not in n}
    assert sum(ours[n].format == fmt for n in bases) == 14
    assert ours["lm_head"].format == "dense"
    for name in bases:
        assert torch.equal(ours[name].read(torch.float32), theirs[name].read(torch.float32)), name
    assert attached.is_quantized
    assert loaded.is_quantized


def test_a_dense_load_is_the_checkpoint(folder):
    model = la.load(folder, device="cpu")
    expected = llama().state_dict()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert quantized_format(model) is None
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_dtype_and_config_fields(folder):
    assert la.load(folder, dtype="bfloat16").dtype == torch.bfloat16
    model = la.load(folder, task="text-classification", num_labels=5)
    assert model.score.weight.shape[0] == 5


def test_a_mapping_of_roles(folder):
    model = la.load(folder, quantization={"mlp": "nf4"})
    formats = {n: s.format for n, s in stores(model).items()}
    assert formats["model.layers.0.mlp.up_proj"] == "nf4"
    assert formats["model.layers.0.self_attn.q_proj"] == "dense"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(device="gpu"), RequestError, "no device"),
        (dict(dtype="float31"), RequestError, "no floating dtype"),
        (dict(task="causal-ml"), RequestError, "causal-lm"),
        (dict(backend="tensorflow"), RequestError, "no backend 'tensorflow'"),
        (dict(num_lables=3), RequestError, "num_labels"),
        (dict(quantization="nf5x"), RequestError, "nf4"),
    ],
)
def test_bad_input(folder, options, error, message):
    with pytest.raises(error, match=message):
        la.load(folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(folder):
    with pytest.raises(RequestError, match="no such device here"):
        la.load(folder, device="cuda")


def test_a_name_nobody_knows():
    with pytest.raises(LoraAdaptersError, match="No backend can load"):
        la.load("no/such-model-anywhere")


def test_too_little_memory_is_refused_before_weights_are_read(folder, monkeypatch):
    import lora_adapters.preflight as preflight

    monkeypatch.setattr(preflight, "free_memory", lambda device: 40_000)
    with pytest.raises(DoesNotFitError, match=r"(?s)Loading needs .* lacks"):
        la.load(folder)


def test_quantizing_twice_differently_is_refused(folder):
    model = la.load(folder, quantization="nf4")
    with pytest.raises(RequestError, match="already quantized to nf4"):
        la.attach(model, rank=2, quantization="int8")
    la.attach(model, rank=2, quantization="nf4")


def test_train_eval_train_on_a_4_bit_base(folder):
    model = la.load(folder, quantization="nf4", device="cpu")
    adapter = la.attach(model, rank=2, seed=0)
    ids = torch.arange(3, 11)[None]
    gradients = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(g.abs().sum() > 0 for g in gradients[0])


def test_the_plan_predicts_memory(folder):
    model = la.load(folder)
    memory = la.plan(model, rank=2, quantization="nf4").memory(batch_size=2, sequence_length=16)
    assert memory.total > memory.activations > memory.adapter > 0
    dense = la.plan(model, rank=2).memory(batch_size=2, sequence_length=16)
    assert dense.weights > memory.weights
    assert quantized_format(model) is None


# ---- progress bars ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("hub", [True, False])
def test_progress_says_whether_bars_are_shown(folder, tmp_path, capfd, monkeypatch, enabled, hub):
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    monkeypatch.delenv("TQDM_DISABLE", raising=False)

    def switches():
        return logging.is_progress_bar_enabled(), not are_progress_bars_disabled()

    def bars(**options):
        capfd.readouterr()
        la.load(folder, device="cpu", **options)
        assert switches() == (enabled, hub)
        return "Loading weights" in capfd.readouterr().err

    start = switches()
    try:
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
        (enable_progress_bars if hub else disable_progress_bars)()
        assert bars() == enabled
        assert bars(progress=True)
        assert not bars(progress=False)
        with pytest.raises(LoraAdaptersError):
            la.load("nobody/has-this", backend="transformers", progress=False)
        assert switches() == (enabled, hub)
        la.attach(la.load(folder, device="cpu"), rank=2).save(tmp_path / "a")
        capfd.readouterr()
        la.merge_checkpoint(folder, tmp_path / "a", tmp_path / "out", progress=False)
        assert capfd.readouterr().err == ""
        assert switches() == (enabled, hub)
    finally:
        (logging.enable_progress_bar if start[0] else logging.disable_progress_bar)()
        (enable_progress_bars if start[1] else disable_progress_bars)()


def test_the_users_variable_has_the_last_word_and_nothing_is_said_about_it(folder):
    code = (
        "import sys, warnings; warnings.simplefilter('error', UserWarning); import lora_adapters as la; "
        "[la.load(sys.argv[1], device='cpu', progress=show) for show in (True, False)]"
    )
    for value in ("0", "1"):
        variables = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": value}
        run = subprocess.run(
            [sys.executable, "-c", code, folder], env=variables, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("quantization", ["nf4", {"attention": "nf4", "mlp": "int8"}])
def test_a_plan_says_how_the_base_is_stored(tmp_path, quantization):
    """What it trains whole stays dense; without the plan loading could not know of it."""
    from bases import bert_base

    from lora_adapters.api import skeleton

    source = {"task": "text-classification", "num_labels": 3}
    name = bert_base(tmp_path / "bert")
    asked = {"rank": 2, "targets": "all-linear", "modules_to_save": ["classifier", "pooler"]}
    made = la.plan(skeleton(name, **source), **asked, quantization=quantization)
    assert made.quantize
    assert "bert.pooler.dense" not in made.quantize
    model = la.load(name, plan=made, **source)
    formats = {n: s.format for n, s in stores(model).items()}
    assert formats == {n: made.quantize.get(n, "dense") for n in formats}
    adapter = la.attach(model, **asked)
    assert set(adapter.plan.trained) == {"classifier", "pooler"}
    with pytest.raises(RequestError, match="leave quantization out"):
        la.load(name, plan=made, quantization="nf4", **source)
