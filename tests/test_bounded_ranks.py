"""Where the backend bounds ranks, no adapter that a role chose is larger than its layer."""

import math

import pytest
import torch
from fused_models import FusedBackend, fused_net, images, register
from helpers import perturb
from torch import nn

import lora_adapters as la
from lora_adapters.attach_plan import adapter_parameters
from lora_adapters.errors import RequestError
from lora_adapters.generic import GenericBackend
from lora_adapters.planning import _largest_rank


class Small(nn.Module):
    """Layers for which rank 16 is much, too much, or more than any rank may be."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(64, 64, 3)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.squeeze = nn.Conv2d(64, 4, 1)
        self.one = nn.Conv2d(4, 1, 1)
        self.expand = nn.Conv2d(4, 30, 1)

    def forward(self, x):
        return self.expand(self.squeeze(self.depthwise(self.wide(x)))), self.one(self.squeeze(x))


@pytest.fixture
def _bounded(monkeypatch):
    original = GenericBackend.classify

    def classify(self, info, maps):
        from dataclasses import replace

        return replace(original(self, info, maps), bounded=True)

    monkeypatch.setattr(GenericBackend, "classify", classify)


def ranks(plan):
    return {layer.name: layer.rank for layer in plan.layers}


@pytest.mark.parametrize("out", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("width", [1, 2, 9, 65, 576])
def test_the_largest_rank_is_the_last_that_is_no_larger(out, width):
    best = max(r for r in range(min(out, width) + 1) if r * (out + width) <= out * width)
    assert _largest_rank(out, width) == best
    assert adapter_parameters("linear", (out, width), best) <= out * width


@pytest.mark.usefixtures("_bounded")
def test_ranks_and_reasons():
    plan = la.plan(Small(), rank=16, targets="conv")
    assert ranks(plan) == {"wide": 16, "depthwise": 7, "squeeze": 3, "expand": 3}
    assert all(layer.parameters <= math.prod(layer.shape) for layer in plan.layers)
    (skipped,) = plan.skipped
    assert (skipped.name, skipped.reason) == (
        "one",
        "an adapter of rank 1 would be larger than the layer itself, 1 x 4 x 1 x 1",
    )
    assert any(note.startswith("3 layers got a smaller rank than asked for (first 'depthwise')") for note in plan.notes)
    assert not any("smaller rank" in note for note in la.plan(Small(), rank=2, targets="conv").notes)


@pytest.mark.usefixtures("_bounded")
@pytest.mark.parametrize(
    ("given", "scale"), [({}, 1), ({"alpha": 32}, 2), ({"alpha": 32, "use_rslora": True}, 8), ({"use_rslora": True}, 4)]
)
def test_the_scale_stays_as_asked(given, scale, tmp_path):
    model = Small()
    adapter = la.attach(model, rank=16, targets="conv", **given)
    assert {round(layer.scaling, 9) for layer in adapter.plan.layers} == {scale}
    if not given:
        assert {layer.alpha for layer in adapter.plan.layers} == {16, 7, 3}
        assert all(isinstance(layer.alpha, int) for layer in adapter.plan.layers)
    perturb(model)
    adapter.save(tmp_path)
    fresh = Small()
    fresh.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora" not in k})
    back = la.restore(fresh, tmp_path)
    assert ranks(back.plan) == ranks(adapter.plan)
    x = torch.randn(1, 64, 6, 6)
    assert torch.allclose(back.model(x)[0], adapter.model(x)[0], atol=1e-6)


@pytest.mark.usefixtures("_bounded")
def test_who_names_a_layer_gets_what_was_asked_for():
    assert ranks(la.plan(Small(), rank=4, targets=["squeeze", "expand"])) == {"squeeze": 4, "expand": 4}
    assert ranks(la.plan(Small(), targets={"conv": 16, "squeeze": 4}))["squeeze"] == 4
    with pytest.raises(RequestError, match="rank 5 is larger than layer 'squeeze'"):
        la.plan(Small(), rank=5, targets=["squeeze"])
    assert ranks(la.plan(Small(), rank=1, targets=["one"])) == {"one": 1}


def test_without_the_backend_s_word_nothing_is_bounded():
    with pytest.raises(RequestError, match="rank 16 is larger than layer 'depthwise'"):
        la.plan(Small(), rank=16, targets="conv")
    assert ranks(la.plan(Small(), rank=1, targets="conv"))["one"] == 1


def test_each_part_is_bounded_by_its_own_rows(monkeypatch):
    register()
    monkeypatch.setattr(FusedBackend, "bounded", True)
    plan = la.plan(fused_net(), targets={"q": 16, "v": 32}, alpha=None)
    layer = plan.layers[0]
    assert [(p.role, p.rank) for p in layer.parts] == [("q", 16 * 64 // 80), ("v", 32 * 64 // 96)]
    assert (layer.rank, layer.alpha, layer.scaling) == (33, 33, 1)
    model = fused_net()
    adapter = la.attach(model, targets={"q": 16, "v": 32})
    perturb(model)
    y = adapter.model(images())
    adapter.merge()
    assert torch.allclose(model(images()), y, atol=1e-4)
