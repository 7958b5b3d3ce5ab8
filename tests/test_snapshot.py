"""A snapshot takes back exactly what was changed since."""

import torch
from torch import nn

from lora_adapters.snapshot import Snapshot


def test_children_attributes_hooks_and_flags_come_back():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    first = model[0]
    snapshot = Snapshot(model)
    model[0] = nn.Linear(2, 3)
    model.extra = 5
    model[2].weight.requires_grad_(False)
    model[1].register_forward_hook(lambda *_: None)
    model[2].add_module("child", nn.ReLU())
    changes = snapshot.changes()
    model.later = "set by the user afterwards"
    changes.revert()
    assert model[0] is first
    assert not hasattr(model, "extra")
    assert model.later == "set by the user afterwards"
    assert model[2].weight.requires_grad
    assert not model[1]._forward_hooks
    assert not list(model[2].children())
    assert [name for name, _ in model.named_children()] == ["0", "1", "2"]


def test_values_come_back_when_asked():
    model = nn.Linear(2, 2)
    before = model.bias.detach().clone()
    snapshot = Snapshot(model, keep_values=[model.bias])
    with torch.no_grad():
        model.bias.add_(1)
        model.weight.add_(1)
    weight = model.weight.detach().clone()
    snapshot.changes().revert()
    assert torch.equal(model.bias, before)
    assert torch.equal(model.weight, weight)
