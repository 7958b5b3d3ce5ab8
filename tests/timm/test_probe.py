"""The bypass probe: it finds reads and unused layers, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers import assert_same, state
from lora_adapters_timm import probe
from lora_adapters_timm.inputs import image_shape
from torch import nn
from torch.nn import functional as F

import lora_adapters as la
from lora_adapters.targets import ModelInfo, candidates


class Reader(nn.Module):
    """Reads one weight, calls one layer, leaves one alone, and asks another's dtype."""

    def __init__(self):
        super().__init__()
        self.conv, self.read = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
        self.asked, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def mix(self, x):
        return F.linear(x, self.read.weight[:2])

    def forward(self, x):
        x = self.conv(x).mean((2, 3)).to(self.unused.weight.dtype)
        return self.mix(x) + self.asked(x)[:, :2]


def uses(model: nn.Module) -> probe.Uses:
    return probe.uses_of(ModelInfo("timm", type(model).__name__, candidates(model), model))


@pytest.fixture
def small_images(monkeypatch):
    monkeypatch.setattr(probe, "image_shape", lambda model: (3, 16, 16))


def test_reads_and_unused_layers_are_found(small_images):
    found = uses(Reader())
    assert found.reads == {"read": "Reader.mix reads its weight"}
    assert set(found.uncalled) == {"unused"}
    assert found.notes == ()


@pytest.mark.parametrize(
    "name, options, who",
    [
        ("beit_base_patch16_224", {"depth": 1, "img_size": 32}, "Attention.forward"),
        ("vit_tiny_patch16_dinov3_qkvb", {"depth": 1, "img_size": 32}, "EvaAttention.forward"),
        ("swinv2_tiny_window8_256", {"depths": (1, 1, 1, 1)}, "WindowAttention.forward"),
    ],
)
def test_timms_readers(name, options, who):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    found = uses(model)
    assert {n.rpartition(".")[2] for n in found.reads} == {"qkv"}
    assert set(found.reads.values()) == {f"{who} reads its weight"}
    assert found.uncalled == {}


def test_the_model_and_the_random_state_stay_as_they_are():
    model = timm.create_model("test_resnet", num_classes=5, drop_path_rate=0.1).train()
    before, rng, modes = state(model), torch.get_rng_state(), [m.training for m in model.modules()]
    uses(model)
    assert_same(model, before)
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]


def test_attention_biases_are_not_left_in_a_models_cache():
    model = timm.create_model("levit_128s", img_size=64).eval()
    uses(model)
    caches = [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")]
    assert caches
    assert not any(caches)


def test_the_answer_is_the_same_with_adapters_on_and_in_half_precision():
    model = timm.create_model("test_vit", img_size=32, num_classes=5)
    bare = uses(model)
    assert uses(copy.deepcopy(model).to(torch.bfloat16)) == bare
    la.attach(model, rank=2)
    assert uses(model) == bare


def test_a_forward_that_needs_values_is_read_instead(small_images):
    class Looks(Reader):
        def mix(self, x):
            if x.sum().item() > 0:
                x = -x
            return F.linear(x, self.read.weight[:2])

    found = uses(Looks())
    assert set(found.reads) == {"read"}
    assert found.uncalled == {}
    assert "can't be run without data" in found.notes[0]


@pytest.mark.parametrize(
    "name, options, shape",
    [
        ("test_vit", {"img_size": 48}, (3, 48, 48)),
        ("test_vit", {"img_size": (32, 64)}, (3, 32, 64)),
        ("test_resnet", {"in_chans": 1}, (1, 160, 160)),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}, (3, 64, 64)),
        ("test_coatnet", {"img_size": 64}, (3, 64, 64)),
        ("gemma4_vit_167m", {"depth": 1}, (3, 768, 768)),
    ],
)
def test_images_are_of_the_size_that_the_model_was_made_for(name, options, shape):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    assert image_shape(model) == shape


def test_memory_is_predicted_without_labels():
    with torch.device("meta"):
        model = timm.create_model("test_vit", num_classes=5, img_size=32)
    one, two = (la.plan(model, rank=2).memory(batch_size=n).activations for n in (1, 2))
    assert 0 < one < two
