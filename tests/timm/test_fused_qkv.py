"""The rows of q, k and v in fused projections, against an oracle that knows no layout."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import timm
import torch
from lora_adapters_timm.backend import TimmBackend
from lora_adapters_timm.fused_qkv import parts_of
from torch import nn

from lora_adapters.targets import ModelInfo, candidates

BACKEND = TimmBackend()
#: model, options, size of the image, a fused projection.
LAYOUTS = [
    ("test_vit", {"img_size": 64}, 64, "blocks.0.attn.qkv"),
    ("levit_128s", {"img_size": 128}, 128, "stages.0.blocks.0.attn.qkv.linear"),  # per head, values wider than keys
    ("levit_128s", {"img_size": 128}, 128, "stages.1.downsample.attn_downsample.kv.linear"),
    ("test_coatnet", {"img_size": 64}, 64, "stages.2.blocks.0.attn.qkv"),  # a convolution, heads first
    ("efficientvit_b0", {}, 128, "stages.2.blocks.1.context_module.main.qkv.conv"),  # linear attention
    ("shvit_s1", {}, 128, "stages.1.blocks.0.mixer.m.qkv.c"),
    ("convit_tiny", {"img_size": 64}, 64, "blocks.0.attn.qk"),
    ("pvt_v2_b0", {}, 64, "stages.0.blocks.0.attn.kv"),
    ("xcit_nano_12_p8_224", {"img_size": 64}, 64, "blocks.0.attn.qkv"),  # attention over channels
    (
        "vit_pwee_patch16_reg1_gap_256",
        {"img_size": 64, "depth": 1},
        64,
        "blocks.0.in_proj",
    ),  # a feed-forward part first
    ("vit_tiny_patch16_dinov3_qkvb", {"img_size": 64, "depth": 1}, 64, "blocks.0.attn.qkv"),  # read without a call
]


@pytest.fixture(scope="module")
def oracle():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield importlib.import_module("attention_oracle")


def make(name: str, options: dict) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options).eval()


def parts(model: nn.Module):
    return BACKEND.classify(ModelInfo("timm", BACKEND.family(model), candidates(model), model), ()).parts


@pytest.mark.parametrize("name, options, size, projection", LAYOUTS, ids=[f"{row[0]}-{row[3]}" for row in LAYOUTS])
def test_rows_do_what_their_parts_say_and_no_other_layout_does(oracle, name, options, size, projection):
    model, image = make(name, options), torch.randn(1, 3, size, size)
    known = dict(parts(model)[projection])
    assert oracle.check_layout(model, image, projection, known) == ""
    swapped = {"q": ("k", "q"), "k": ("v", "k")}
    for one, other in (swapped["q"], swapped["k"], ("v", "q")):
        if one in known and other in known:
            wrong = known | {one: known[other], other: known[one]}
            assert oracle.check_layout(model, image, projection, wrong) != "", (one, other)


@pytest.mark.parametrize(
    "name, options, size, projection", [row for row in LAYOUTS if row[0] in ("levit_128s", "test_coatnet")]
)
def test_the_oracle_sees_that_heads_are_interleaved(oracle, name, options, size, projection):
    model, image = make(name, options), torch.randn(1, 3, size, size)
    known = parts(model)[projection]
    end, whole, start = max(rows[-1][1] for rows in known.values()), {}, 0
    for role, rows in known.items():
        width = sum(b - a for a, b in rows)
        whole[role], start = ((start, start + width),), start + width
    assert start == end
    assert oracle.check_layout(model, image, projection, whole) != ""


def test_every_row_of_a_whole_projection_has_one_part():
    for name, options, _, projection in LAYOUTS:
        model = make(name, options)
        layer = model.get_submodule(projection)
        rows = [r for ranges in parts(model)[projection].values() for a, b in ranges for r in range(a, b)]
        assert len(rows) == len(set(rows))
        first = layer.weight.shape[0] - len(rows)  # a feed-forward part comes first
        assert sorted(rows) == list(range(first, layer.weight.shape[0]))
        assert first == 0 or projection.endswith("in_proj")


def test_an_attention_of_unknown_class_has_no_layout():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    assert parts_of(Attention(), nn.Linear(8, 24), "qkv") == {}


def test_a_layout_that_does_not_fit_the_layer_is_none():
    model = make("levit_128s", {"img_size": 64})
    owner = model.stages[0].blocks[0].attn
    assert parts_of(owner, owner.qkv.linear, "qkv.linear") != {}
    assert parts_of(owner, nn.Linear(128, 255), "qkv.linear") == {}
