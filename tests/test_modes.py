"""Training and evaluation mode."""

import pytest
import torch
from torch import nn

from lora_adapters.modes import modes_kept
from lora_adapters.runs.measuring import evaluating


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    made[1].eval()  # a part with a mode of its own
    return made


def modes(*models: nn.Module) -> list[bool]:
    return [module.training for one in models for module in one.modules()]


def test_every_module_is_in_the_mode_that_it_was_in():
    one, other = model(), model().eval()
    before = modes(one, other)
    with pytest.raises(ValueError), modes_kept(one, other):
        one.eval()
        other.train()
        raise ValueError
    assert modes(one, other) == before


def test_measuring_leaves_parts_in_their_own_mode():
    one = model()
    before = modes(one)
    with evaluating(one):
        assert not any(modes(one))
        assert not torch.is_grad_enabled()
    assert modes(one) == before
