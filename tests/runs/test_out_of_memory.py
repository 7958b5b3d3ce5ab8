"""Failed allocations are known as such, and the message gives settings that the plan says fit."""

import numpy
import pytest
import torch
from bases import llama_base, sums, write_recipe, write_rows

from lora_adapters.budget import suggest_fit
from lora_adapters.errors import DoesNotFitError
from lora_adapters.recipes.reading import read_recipe
from lora_adapters.runs.out_of_memory import explain, is_out_of_memory
from lora_adapters.runs.runner import runner_for

GIB, LIBRARIES = 2**30, 80 * 2**20


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**60),
        lambda: torch.ones(2**46).sum(),
        lambda: torch.empty(1).expand(2**50).clone(),
        lambda: bytearray(2**62),
        lambda: numpy.ones(2**58),
    ],
    ids=["empty", "ones", "clone", "bytearray", "numpy"],
)
def test_a_failed_allocation_is_known(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "fail",
    [lambda: torch.zeros(2) @ torch.zeros(3), lambda: torch.zeros(2**62, 2**62), lambda: {}["memory"]],
)
def test_other_failures_are_not(fail):
    with pytest.raises(Exception) as caught:
        fail()
    assert not is_out_of_memory(caught.value)


def test_what_was_explained_already_is_not_explained_again():
    assert not is_out_of_memory(DoesNotFitError("the weights need more than is free"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oom")
    return write_recipe(
        folder / "recipe.yaml",
        task="causal-lm",
        model={"name": llama_base(folder / "llama"), "device": "cpu"},
        adapter={"rank": 4},
        data={"train": write_rows(folder / "qa.jsonl", sums(8)), "prompt": "question", "completion": "answer"},
        training={"batch_size": 64, "max_length": 64},
        output=str(folder / "run"),
    )


def explained(path, share, *overrides):
    """Return the message where that share of a step's memory was free beside the libraries, and the step's bytes."""
    recipe = read_recipe(path, overrides)
    runner = runner_for(recipe)
    runner.check()
    rows, length = runner.shape()
    plan = runner.plan(recipe.model.quantization)
    step = runner.memory(plan, rows, length, recipe.training.gradient_checkpointing).total
    free = int((share * step) * 1.05) + LIBRARIES
    return str(explain(recipe, runner, free, "cpu")), step


def predicted(path, *overrides):
    """Return what the plan says a recipe's step takes."""
    recipe = read_recipe(path, overrides)
    runner = runner_for(recipe)
    runner.check()
    made = runner.plan(recipe.model.quantization)
    return runner.memory(made, *runner.shape(), recipe.training.gradient_checkpointing).total


BASES = {
    "dense": [],
    "by role": ["model.quantization={mlp: nf4}", "training.batch_size=49", "training.gradient_accumulation=3"],
    "checkpointed": ["training.gradient_checkpointing=true"],
}


@pytest.mark.parametrize("name", list(BASES))
def test_every_way_out_fits_and_computes_the_same_batch(recipe, name):
    message, step = explained(recipe, 0.4, *BASES[name])
    before = read_recipe(recipe, BASES[name])
    assert message.startswith(f"Out of memory on cpu: a step of {before.training.batch_size} x ")
    ways = [way.rpartition(" (")[0].split() for way in message.split("Would fit: ")[1].split("; ")]
    assert len(ways) == 3
    for way in ways:
        assert predicted(recipe, *BASES[name], *way) <= 0.4 * step
        after = read_recipe(recipe, [*BASES[name], *way])
        rows = before.training.batch_size * before.training.gradient_accumulation
        assert after.training.batch_size * after.training.gradient_accumulation == pytest.approx(rows, rel=0.1)
    assert ("model.quantization=nf4" in message) == (name != "by role")
    assert "gradient_checkpointing=false" not in message


def test_rows_never_become_shorter_than_a_recipe_may_say():
    def memory(rows, length, checkpointing, quantization):
        return rows * length

    found = suggest_fit(memory, 16, batch_size=1, sequence_length=62, quantizations=(None,), shortest=8)
    assert [setting.sequence_length for setting in found] == [15]
    assert suggest_fit(memory, 6, batch_size=1, sequence_length=62, quantizations=(None,), shortest=8) == []


def test_where_nothing_fits(recipe):
    message, _ = explained(recipe, 0.0001)
    assert "No smaller batch, shorter row or 4-bit base fits: take a smaller model." in message
    assert "Would fit" not in message


def test_a_step_that_should_have_fitted(recipe):
    """The plan was wrong, or others took the memory: what is suggested is clearly smaller."""
    message, step = explained(recipe, 1000)
    assert "by the plan" in message
    first = message.split("Would fit: ")[1].split("; ")[0].rpartition(" (")[0].split()
    assert predicted(recipe, *first) <= 0.85 * step


def test_a_model_that_can_not_be_predicted(recipe):
    """What is said then is what always helps."""
    checked = read_recipe(recipe, ["adapter.targets=nothing"])
    message = str(explain(checked, runner_for(checked), GIB, "cpu"))
    assert message.startswith("Out of memory on cpu, where 1.0 GiB were free")
    assert "Halve training.batch_size and double training.gradient_accumulation" in message
