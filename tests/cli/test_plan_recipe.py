"""`lora-adapters plan RECIPE`: the recipe's own step, without a weight being read."""

import json

import pytest
from bases import llama_base, sums, write_recipe, write_rows
from click.testing import CliRunner
from helpers import run_cli

from lora_adapters import cli
from lora_adapters.errors import LoraAdaptersError
from lora_adapters.recipes.reading import read_recipe
from lora_adapters.runs.runner import runner_for


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    base = llama_base(folder / "llama")
    (folder / "llama" / "model.safetensors").unlink()  # the config is enough
    return write_recipe(
        folder / "recipe.yaml",
        task="causal-lm",
        model={"name": base, "device": "cpu"},
        adapter={"rank": 4, "targets": "attention"},
        data={"train": write_rows(folder / "qa.jsonl", sums(8)), "prompt": "question", "completion": "answer"},
        training={"batch_size": 16, "max_length": 64},
        output=str(folder / "run"),
    )


def here(*arguments):
    """Run the command in this process, which needs no second import of torch."""
    return CliRunner().invoke(cli.cli, ["plan", *arguments])


def total(*arguments):
    done = here(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["memory"]["total"]


def test_the_facts_are_those_of_the_recipe(recipe, tmp_path):
    done = run_cli("plan", recipe, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert {layer["rank"] for layer in facts["layers"]} == {4}
    assert {layer["role"] for layer in facts["layers"]} == {"q", "k", "v", "o"}
    assert facts["quantize"] == {}
    runner = runner_for(read_recipe(recipe))
    runner.check()
    rows, length = runner.shape()
    assert rows == 16
    assert length == max(map(len, runner.train_rows.rows["input_ids"])) < 64
    expected = runner.memory(runner.plan(None), rows, length, False)
    assert facts["memory"] == vars(expected)


def test_overrides_change_the_plan(recipe):
    done = here(recipe, "adapter.rank=8", "adapter.targets=mlp", "model.quantization=nf4", "--json")
    facts = json.loads(done.stdout)
    assert {layer["rank"] for layer in facts["layers"]} == {8}
    assert {layer["role"] for layer in facts["layers"]} == {"mlp"}
    assert set(facts["quantize"].values()) == {"nf4"} or "nf4" in facts["quantize"]
    assert total(recipe, "training.batch_size=4") < total(recipe)
    assert total(recipe, "training.gradient_checkpointing=true") < total(recipe)


def test_what_would_fit_does(recipe):
    limit = total(recipe, "--device", "cpu") // 2
    done = run_cli("plan", recipe, "--device", "cpu", "--gpu", str(limit), "--json")
    assert done.returncode == 1
    gpu = json.loads(done.stdout)["gpu"]
    assert (gpu["bytes"], gpu["fits"], len(gpu["settings"])) == (limit, False, 3)
    for setting in gpu["settings"]:
        overrides = [
            f"training.batch_size={setting['batch_size']}",
            f"training.gradient_checkpointing={str(setting['checkpointing']).lower()}",
            f"model.quantization={setting['quantization'] or 'null'}",
        ]
        assert total(recipe, "--device", "cpu", *overrides) == setting["nbytes"] <= limit
    best = gpu["settings"][0]
    fits = here(recipe, f"training.batch_size={best['batch_size']}", "--device", "cpu", "--gpu", "1GiB")
    assert fits.exit_code == 0
    assert "It fits 1.0 GiB" in fits.stdout


def test_checkpointing_that_was_asked_for_stays(recipe):
    asked = (recipe, "--device", "cpu", "training.gradient_checkpointing=true")
    done = here(*asked, "--gpu", str(total(*asked) // 2), "--json")
    assert done.exit_code == 1
    settings = json.loads(done.stdout)["gpu"]["settings"]
    assert settings
    assert all(setting["checkpointing"] for setting in settings)


def test_too_small_for_anything(recipe):
    done = here(recipe, "--gpu", "1KiB")
    assert done.exit_code == 1
    assert "take a smaller model" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rank", "8"), "--rank is for a model; a recipe says it itself"),
        (("--batch-size", "8"), "--batch-size is for a model"),
        (("--checkpointing",), "--checkpointing is for a model"),
        (("--quantization", "nf4"), "--quantization is for a model"),
        (("adapter.rnk=8",), "did you mean 'rank'?"),
        (("adapter.targets=atention",), "attention"),
        (("data.prompt=quesion",), "did you mean 'question'?"),
        (("--gpu", "16 apples"), "is not a size"),
    ],
)
def test_bad_input_says_what_to_do(recipe, arguments, message):
    done = here(recipe, *arguments)
    assert isinstance(done.exception, LoraAdaptersError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
    assert done.stdout == ""


def test_a_model_takes_no_overrides_and_a_missing_recipe_is_one_line(recipe, tmp_path):
    base = read_recipe(recipe).model.name
    assert "only a recipe (a .yaml file) takes key=value" in str(here(base, "adapter.rank=8").exception)
    assert "no such file" in str(here(str(tmp_path / "recipe.yml")).exception)
