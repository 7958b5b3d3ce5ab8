"""What training loops of any task are made of: learning rates, the NaN policy, random states, what is kept."""

import random

import numpy
import pytest
import torch
from helpers import net, perturb

import lora_adapters as la
from lora_adapters.recipes.sections import ModelSection, Recipe, TrainingSection
from lora_adapters.report.facts import RunFacts
from lora_adapters.runs.folder import RunFolder
from lora_adapters.runs.gradients import GradientGuard
from lora_adapters.runs.keeping import keep_checkpoint, raise_unless_finished, save_adapter
from lora_adapters.runs.progress import Progress
from lora_adapters.runs.random_state import read_state, seed_all, write_state
from lora_adapters.runs.runner import DivergedError, Run
from lora_adapters.runs.schedule import learning_rate_share, steps_in_all


@pytest.fixture
def run(tmp_path):
    recipe = Recipe(task="any", model=ModelSection(name="m"), data={}, output=str(tmp_path))
    return Run(recipe, RunFolder(tmp_path), RunFacts("any", "m"), Progress(quiet=True))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 1, 7])
def test_learning_rates_are_those_of_trainer(schedule, warmup, tmp_path):
    from transformers import TrainingArguments, get_scheduler

    training = TrainingSection(schedule=schedule, warmup=warmup)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    first = TrainingArguments(output_dir=str(tmp_path), warmup_steps=warmup, use_cpu=True).get_warmup_steps(30)
    theirs = get_scheduler(name, torch.optim.SGD([torch.zeros(1)], lr=1.0), first, 30)
    for step in range(30):
        assert learning_rate_share(training, step, 30) == pytest.approx(theirs.get_last_lr()[0])
        theirs.optimizer.step()
        theirs.step()


def test_steps_count_what_is_left_over():
    training = TrainingSection(epochs=2.5, batch_size=4, gradient_accumulation=2)
    assert steps_in_all(training, 17) == 8  # 5 batches are 3 steps
    assert steps_in_all(TrainingSection(max_steps=3, epochs=9), 17) == 3


def test_random_states_come_back(tmp_path):
    def draw():
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    seed_all(3)
    first = draw()
    torch.save(read_state(), tmp_path / "state.pt")
    after = draw()
    seed_all(3)
    assert draw() == first
    draw()
    write_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == after


def gradient(value: float) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, value])
    return parameter


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_policies(run, value):
    guard = GradientGuard(run)
    good = gradient(2.0)
    assert guard.passes([good], 1)
    assert good.grad is not None
    bad = gradient(value)
    assert not guard.passes([good, bad], 2)
    assert good.grad is bad.grad is None
    assert guard.diverged == "The gradient of step 2 is not finite."
    assert run.facts.skipped_steps == 1
    run.recipe.training.nan = "raise"
    with pytest.raises(DivergedError, match="step 3"):
        GradientGuard(run).passes([gradient(value)], 3)


def test_skipping_ends_after_25_in_a_row(run):
    run.recipe.training.nan = "skip"
    guard = GradientGuard(run)
    for step in range(1, 25):
        assert not guard.passes([gradient(float("nan"))], step)
    assert guard.passes([gradient(1.0)], 25)
    for step in range(26, 51):
        assert not guard.diverged
        guard.passes([gradient(float("nan"))], step)
    assert guard.diverged == "The gradients of the 25 steps up to step 50 are not finite."
    assert run.facts.skipped_steps == 49


def test_only_finite_values_are_kept(run):
    """A step makes the values inf: the adapter that is kept is the newest checkpoint's."""
    adapter = la.attach(net(), rank=2)
    perturb(adapter.base)
    first = next(adapter.parameters())
    for run.facts.steps in (1, 2):
        folder = run.folder.checkpoints / f"checkpoint-{run.facts.steps}"
        first.data += 1
        adapter.save(folder)
        keep_checkpoint(run, folder)
    assert [path.name for path in run.folder.checkpoints.iterdir()] == ["checkpoint-2"]
    assert run.folder.facts().steps == 2
    good = first.detach().clone()
    first.data[0] = float("inf")
    run.facts.steps = 3
    guard = GradientGuard(run)
    assert save_adapter(run, adapter, guard)
    assert guard.diverged == "The adapter's values after step 3 are not finite."
    assert run.facts.adapter_bytes > 0
    assert torch.equal(next(la.restore(net(), run.folder.adapter).parameters()), good)
    with pytest.raises(DivergedError, match=r"not finite.*step 3; the adapter from before is in"):
        raise_unless_finished(run, guard)


def test_nothing_finite_is_nothing_saved(run):
    adapter = la.attach(net(), rank=2)
    with torch.no_grad():
        next(adapter.parameters())[0] = float("nan")
    guard = GradientGuard(run)
    assert not save_adapter(run, adapter, guard)
    assert not run.folder.adapter.exists()
    with pytest.raises(DivergedError, match="none is kept"):
        raise_unless_finished(run, guard)


@pytest.mark.parametrize("policy", ["stop", "skip", "raise"])
def test_running_statistics_must_be_finite_too(run, policy):
    run.recipe.training.nan = policy
    guard, parameter = GradientGuard(run), torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    assert guard.passes([parameter], 1, [torch.ones(3)])
    if policy == "raise":
        with pytest.raises(DivergedError, match="A running statistic of step 2 is not finite"):
            guard.passes([parameter], 2, [torch.tensor(float("inf"))])
        return
    assert not guard.passes([parameter], 2, [torch.tensor(float("inf"))])
    assert parameter.grad is None
    assert run.facts.skipped_steps == 1
    assert bool(guard.diverged) == (policy == "stop")
