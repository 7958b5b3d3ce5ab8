"""timm's schedules and optimizers mean what the recipe's keys mean everywhere."""

from itertools import pairwise

import pytest
import timm
import torch
from lora_adapters_timm.recipes import ImageTraining
from lora_adapters_timm.training.optimization import make_optimizer, make_schedule, memory_of
from torch import nn

import lora_adapters as la
from lora_adapters.errors import RequestError
from lora_adapters.runs.schedule import learning_rate_share


def rates(training, total, per_epoch=5):
    optimizer = make_optimizer(training, [nn.Parameter(torch.zeros(1))])
    schedule = make_schedule(training, optimizer, total, per_epoch)
    found = []
    for done in range(total):
        schedule.step_update(done)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0, 7.0])
def test_learning_rates_are_those_of_every_task(schedule, warmup):
    training = ImageTraining(schedule=schedule, warmup=warmup, learning_rate=0.3)
    expected = [0.3 * learning_rate_share(training, step, 30) for step in range(30)]
    assert rates(training, 30) == pytest.approx(expected)


def test_steps_fall_at_epochs():
    training = ImageTraining(schedule="step", decay_epochs=2.0, decay_rate=0.5, learning_rate=1.0, warmup=0.0)
    assert rates(training, 25) == pytest.approx([0.5 ** (step // 10) for step in range(25)])
    training = ImageTraining(schedule="multistep", decay_milestones=[1.0, 3.0], learning_rate=1.0, warmup=0.0)
    found = rates(training, 20)
    assert found[3] == 1.0
    assert found[7] == pytest.approx(0.1)
    assert found[18] == pytest.approx(0.01)
    found = rates(ImageTraining(schedule="tanh", learning_rate=1.0, min_learning_rate=0.2, warmup=0.0), 20)
    assert all(a >= b for a, b in pairwise(found))
    assert 0.2 <= found[-1] < 0.3


def test_layers_get_less_the_deeper_they_lie():
    """Groups are those of the whole model although most of it is frozen."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, depth=3, embed_dim=32, num_heads=2, patch_size=8)
    la.attach(model, rank=2, targets="re:fc1", modules_to_save=["head"])
    training = ImageTraining(layer_decay=0.5, learning_rate=1.0, warmup=0.0, weight_decay=0.1)
    optimizer = make_optimizer(training, model)
    make_schedule(training, optimizer, 10, 5).step_update(0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for block, rate in enumerate((0.125, 0.25, 0.5)):
        assert found[f"blocks.{block}.mlp.fc1.lora_A.default.weight"] == rate
    head = next(name for name in found if name.startswith("head") and name.endswith("weight"))
    assert found[head] == 1.0
    assert decay[head] == 0.1
    assert decay[head.replace("weight", "bias")] == 0.0


def test_options_reach_the_optimizer():
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    made = make_optimizer(ImageTraining(optimizer="adamw", optimizer_options={"betas": [0.8, 0.9]}), parameters)
    assert list(made.param_groups[0]["betas"]) == [0.8, 0.9]
    assert type(make_optimizer(ImageTraining(optimizer="lamb"), parameters)).__name__.lower() == "lamb"


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"optimizer": "adamww"}, r"timm has no 'adamww'\. Did you mean 'adamw'"),
        ({"optimizer_options": {"beta": 0.9}}, "adamw does not take them"),
    ],
)
def test_what_timm_has_not_is_refused(training, message):
    with pytest.raises(RequestError, match=message):
        make_optimizer(ImageTraining(**training), [nn.Parameter(torch.zeros(1))])


def test_memory_knows_the_optimizer():
    assert memory_of(ImageTraining()) == "adamw"
    made = memory_of(ImageTraining(optimizer="sgd"))([nn.Parameter(torch.zeros(3))])
    assert made.param_groups[0]["momentum"] == 0.9
