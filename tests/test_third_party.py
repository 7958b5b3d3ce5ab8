"""Plugins of other people: the installed example works through its entry point, and broken ones do no harm."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_cli
from lora_adapters_example import int4, models

from lora_adapters import api, hookimpl
from lora_adapters.errors import MissingDependencyError, RequestError
from lora_adapters.hooks.manager import plugins
from lora_adapters.hooks.specs import BackendSpec
from lora_adapters.recipes.reading import dump, validate
from lora_adapters.runs.out_of_memory import explain
from lora_adapters.runs.runner import runner_for
from lora_adapters.weights import store_for

EXAMPLE = Path(__file__).parents[1] / "examples" / "third_party_plugin"


def _contracts():
    spec = importlib.util.spec_from_file_location("example_contracts", EXAMPLE / "tests" / "test_contracts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The example's own tests, collected here too.
TestMixer = _contracts().TestMixer
TestMixerWithANewClassifier = _contracts().TestMixerWithANewClassifier
TestInt4Rows = _contracts().TestInt4Rows
TestMixerClassification = _contracts().TestMixerClassification


def test_the_entry_point_is_found():
    status = {s.name: s for s in plugins().status()}["example"]
    assert (status.state, status.origin) == ("ready", "lora-adapters-example 0.1.0")
    assert status.hooks == tuple(
        f"lora_adapters_{what}" for what in ("backends", "layers", "quantizers", "target_maps", "trainers")
    )


def test_its_backend_quantizer_and_layer_serve_attach():
    model = models.Mixer()
    adapter = api.attach(model, rank=4, quantization="int4-rows")
    assert adapter.plan.backend == "mixer"
    assert {layer.role for layer in adapter.plan.layers} == {"mlp"}
    assert {layer.layer for layer in adapter.plan.layers} == {"lora_adapters.layers.linear:Linear"}
    assert set(adapter.plan.quantize) == {"patches", *adapter.layers}
    assert type(model.classifier) is torch.nn.Linear
    assert {store_for(layer.get_base_layer()).format for layer in adapter.layers.values()} == {"int4-rows"}


def test_a_quantizer_of_no_active_plugin_is_refused(monkeypatch):
    """Its layers could be made, and then neither merged nor restored to."""
    model = models.Mixer()
    assert set(api.plan(model, rank=4, quantization=int4.Int4Rows()).quantize.values()) == {"int4-rows"}
    monkeypatch.setenv("LORA_ADAPTERS_DISABLE", "example")
    plugins.cache_clear()
    for quantization in (int4.Int4Rows(), {"other": int4.Int4Rows()}):
        with pytest.raises(RequestError, match=r"Int4Rows is of no active plugin.*lora_adapters_quantizers"):
            api.attach(model, rank=4, targets="all-linear", quantization=quantization)
    assert not [m for m in model.modules() if isinstance(m, int4.Int4Linear)]


def test_a_base_it_quantized_is_not_quantized_again():
    model = models.Mixer()
    api.attach(model, rank=2, quantization="int4-rows").detach()
    assert api.attach(model, rank=2, quantization="int4-rows").plan.quantize == {}
    with pytest.raises(RequestError, match="already quantized to int4-rows"):
        api.plan(model, rank=2, quantization="nf4")


def test_the_plan_of_a_meta_model_says_the_bytes():
    with torch.device("meta"):
        model = models.Mixer(channels=512)
    made = api.plan(model, rank=4, quantization="int4-rows")
    sizes = {layer.name: layer.weight_bytes for layer in made.layers}
    assert sizes["blocks.0.channels.up"] == 1024 * 256 + 2 * 1024


def test_load_goes_through_the_backend(tmp_path):
    model = models.Mixer(blocks=1)
    model.save(tmp_path)
    loaded = api.load(str(tmp_path), backend="mixer", device="cpu")
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    with pytest.raises(RequestError, match="attach"):
        api.load(str(tmp_path), backend="mixer", quantization="int4-rows")


def test_a_backend_that_cannot_be_used_does_not_stop_load(tmp_path):
    class Unusable:
        @hookimpl
        def lora_adapters_backends(self):
            missing = BackendSpec("far", ("far",), "far.away:Backend", requires=("no_such_package",), priority=9)
            return [missing, BackendSpec("odd", ("odd",), "no_such_module:Backend", priority=8)]

    plugins().register(Unusable(), "unusable")
    models.Mixer(blocks=1).save(tmp_path)
    assert type(api.load(str(tmp_path), device="cpu")) is models.Mixer
    with pytest.raises(MissingDependencyError, match="no_such_package"):
        api.load(str(tmp_path), backend="far")


@pytest.mark.parametrize("progress", [None, True, False])
def test_a_backend_without_progress_bars_is_not_asked_about_them(tmp_path, progress):
    models.Mixer(blocks=1).save(tmp_path)
    assert type(api.load(str(tmp_path), device="cpu", progress=progress)) is models.Mixer


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("compile", True, "training.compile: must be false for this task, got true."),
        ("report_to", ["wandb"], "training.report_to: must be empty for this task, got 1."),
        ("optimizer", "adamw_8bit", "training.optimizer: 'adamw_8bit' is none of adamw, sgd; did you mean 'adamw'?"),
    ],
)
def test_what_a_task_cannot_do_is_refused_by_its_recipe(key, value, message):
    recipe = {"task": "mixer-classification", "model": {"name": "m"}, "data": {"train": "d"}, "output": "o"}
    with pytest.raises(RequestError) as caught:
        validate({**recipe, "training": {key: value}})
    assert str(caught.value) == f"recipe: {message}"


def test_a_task_without_checkpointing_gets_other_settings_that_fit(tmp_path):
    """Its Mixer can't be checkpointed and its rows have no length: neither is suggested, and nothing else is lost."""
    models.Mixer(patches=16, values=4, channels=256, classes=10).save(tmp_path)
    np.savez(tmp_path / "noise.npz", images=np.random.default_rng(0).random((64, 8, 8)), labels=np.arange(64) % 3)
    recipe = validate(
        {
            "task": "mixer-classification",
            "model": {"name": str(tmp_path), "device": "cpu", "quantization": "int4-rows"},
            "data": {"train": str(tmp_path / "noise.npz")},
            "training": {"batch_size": 64},
            "output": str(tmp_path / "run"),
        }
    )
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    done = run_cli("plan", str(tmp_path / "recipe.yaml"), "--json")
    whole = json.loads(done.stdout)["memory"]["total"]
    done = run_cli("plan", str(tmp_path / "recipe.yaml"), "--gpu", str(whole // 2), "--device", "cpu", "--json")
    settings = json.loads(done.stdout)["gpu"]["settings"]
    assert [(s["batch_size"], s["sequence_length"], s["checkpointing"]) for s in settings[:1]] == [(16, 1, False)], (
        settings
    )
    runner = runner_for(recipe)
    runner.check()
    message = str(explain(recipe, runner, whole + (100 << 20), "cpu"))
    assert message.startswith("Out of memory on cpu: a step of 64 rows takes ")
    assert "Would fit: training.batch_size=32 training.gradient_accumulation=2 (" in message
    assert "checkpointing" not in message


# ---- in a process of its own: plugins that are broken --------------------------------------------------------------

ATTACH = """
import json, warnings
from lora_adapters import attach
from lora_adapters.hooks.manager import plugins
from lora_adapters_example.models import Mixer

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    adapter = attach(Mixer(), rank=2, quantization="int4-rows")
said = [str(w.message) for w in caught if w.category.__name__ == "PluginWarning"]
states = {s.name: [s.state, s.detail] for s in plugins().status()}
print(json.dumps({"layers": len(adapter.layers), "said": said, "states": states}))
"""

LIST = """
import json, sys, warnings
from lora_adapters.hooks.manager import plugins

warnings.simplefilter("error")
states = {s.name: [s.state, s.detail] for s in plugins().status()}
print(json.dumps({"states": states, "imported": [n for n in sys.modules if n in ("torch", "broken_at_import")]}))
"""


@pytest.fixture
def broken_distribution(tmp_path):
    """A folder as pip leaves it: two plugins of one distribution, one that can't be imported, one whose hooks fail."""
    info = tmp_path / "broken_plugins-6.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugins\nVersion: 6.6\n")
    (info / "entry_points.txt").write_text("[lora_adapters]\nearly = broken_at_import\nlate = broken_when_called\n")
    (tmp_path / "broken_at_import.py").write_text("raise RuntimeError('no licence')\n")
    hooks = ("backends", "target_maps", "quantizers", "layers", "edit_plan", "attached")
    lines = [f"@hookimpl\ndef lora_adapters_{hook}():\n    raise OSError('no disk')\n" for hook in hooks]
    (tmp_path / "broken_when_called.py").write_text("\n".join(["from lora_adapters import hookimpl\n", *lines]))
    return tmp_path


def _run(script, folder, **environment):
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_broken_plugins_neither_stop_attach_nor_go_unmentioned(broken_distribution):
    done = _run(ATTACH, broken_distribution)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["layers"] == 8
    said = " ".join(result["said"])
    assert "'early' (broken-plugins 6.6) is set aside: its import failed with RuntimeError: no licence" in said
    assert "'late' (broken-plugins 6.6) is set aside" in said
    assert "OSError: no disk" in said
    assert result["states"]["early"][0] == result["states"]["late"][0] == "broken"
    assert result["states"]["example"] == ["ready", ""]


def test_strict_stops_at_the_first_broken_plugin(broken_distribution):
    done = _run(LIST, broken_distribution, LORA_ADAPTERS_STRICT="1")
    assert done.returncode != 0
    assert "PluginError: Plugin 'early' (broken-plugins 6.6)" in done.stderr


def test_blocked_plugins_are_not_imported(broken_distribution):
    done = _run(LIST, broken_distribution, LORA_ADAPTERS_DISABLE="early,late")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["states"]["early"] == result["states"]["late"] == ["blocked", "by LORA_ADAPTERS_DISABLE"]
    assert result["states"]["example"] == ["ready", ""]
    assert result["imported"] == [], "Listing plugins must import neither a blocked one nor torch."
