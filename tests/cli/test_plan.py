"""`lora-adapters plan` as a shell sees it, on a model folder without reading its weights."""

import json

import pytest
from click.testing import CliRunner
from helpers import llama
from helpers import run_cli as run

import lora_adapters as la
from lora_adapters import cli
from lora_adapters.errors import LoraAdaptersError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    (path / "model.safetensors").unlink()  # the config is enough
    return str(path)


def test_the_facts_are_those_of_the_plan(folder):
    done = run("plan", folder, "--rank", "4", "--targets", "attention", "--quantization", "nf4", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    plan = la.plan(llama(), rank=4, targets="attention", quantization="nf4")
    assert [layer["name"] for layer in facts["layers"]] == [layer.name for layer in plan.layers]
    assert {layer["rank"] for layer in facts["layers"]} == {4}
    assert facts["quantize"] == dict(plan.quantize)
    assert facts["trainable_parameters"] == plan.trainable_parameters
    assert facts["memory"] == vars(plan.memory(1, 512, device="cuda"))


def test_the_table_and_what_fits(folder):
    done = here(folder, "--batch-size", "8", "--sequence-length", "64", "--gpu", "1GiB")
    assert done.exit_code == 0, done.output
    assert "model.layers.*.self_attn.q_proj" in done.stdout
    assert "Memory of a training step, 8 x 64" in done.stdout
    assert "It fits 1.0 GiB" in done.stdout


def test_what_would_fit_does_and_the_status_tells(folder):
    step = ("--batch-size", "8", "--sequence-length", "64")
    whole = json.loads(here(folder, *step, "--json").stdout)["memory"]["total"]
    limit = whole // 2
    done = run("plan", folder, *step, "--gpu", str(limit), "--json")
    assert done.returncode == 1
    gpu = json.loads(done.stdout)["gpu"]
    assert gpu["bytes"] == limit
    assert gpu["fits"] is False
    assert gpu["settings"]
    assert all(setting["nbytes"] <= limit for setting in gpu["settings"])
    best = gpu["settings"][0]
    again = ["--batch-size", str(best["batch_size"]), "--sequence-length", str(best["sequence_length"])]
    again += ["--checkpointing"] * best["checkpointing"]
    again += ["--quantization", best["quantization"]] if best["quantization"] else []
    done = here(folder, *again, "--gpu", str(limit), "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["memory"]["total"] == best["nbytes"]


def here(*arguments):
    """Run the command in this process, which needs no second import of torch."""
    return CliRunner().invoke(cli.cli, ["plan", *arguments])


def test_nothing_that_fits_is_said(folder):
    done = here(folder, "--gpu", "1KiB")
    assert done.exit_code == 1
    assert "take a smaller model" in done.stdout


def test_quiet_prints_nothing(folder):
    done = here(folder, "--quiet", "--gpu", "1GiB")
    assert (done.exit_code, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--targets", "atention"), "attention"),
        (("--rank", "0"), "rank"),
        (("--quantization", "nf5x"), "nf4"),
        (("--task", "causal-ml"), "causal-lm"),
        (("--gpu", "16 apples"), "is not a size"),
        (("--optimizer", "adam8"), "adamw_8bit"),
    ],
)
def test_bad_input_says_what_to_do(folder, arguments, message):
    done = here(folder, *arguments)
    assert isinstance(done.exception, LoraAdaptersError)
    assert message in str(done.exception)
    assert done.stdout == ""


def test_an_unknown_model_is_one_line(tmp_path):
    done = run("plan", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert "Error: No backend can load" in done.stderr
    assert "Traceback" not in done.stderr
