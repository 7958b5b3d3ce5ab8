"""Roles that follow from structure: heads, embeddings, gates, defaults."""

from __future__ import annotations

import pytest
import timm
import torch
from lora_adapters_timm.backend import TimmBackend
from lora_adapters_timm.heads import classifiers
from torch import nn

import lora_adapters as la
from lora_adapters.errors import NoTargetError
from lora_adapters.hooks.specs import TargetMap
from lora_adapters.targets import Classification, ModelInfo, candidates

BACKEND = TimmBackend()


def make(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **{"num_classes": 5, **options})


def classify(model: nn.Module, maps=()) -> Classification:
    return BACKEND.classify(ModelInfo("timm", BACKEND.family(model), candidates(model), model), maps)


def ends(classes: Classification, role: str) -> set[str]:
    return {name.rpartition(".")[2] for name, r in classes.roles.items() if r == role}


@pytest.mark.parametrize(
    "name, heads",
    [
        ("test_resnet", ("fc",)),
        ("test_vit", ("head",)),
        ("dla46x_c", ("fc",)),  # a 1 x 1 convolution
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("levit_128s", ("head", "head_dist")),  # BatchNorm and a linear layer each
        ("crossvit_tiny_240", ("head.0", "head.1")),
        ("efficientvim_m1", ("heads.0", "heads.1", "heads.2", "heads.3")),
        ("volo_d1_224", ("aux_head", "head")),  # get_classifier() gives one, pretrained_cfg both
        ("inception_next_atto", ("head.fc2",)),
        ("repvit_m1", ("head.head", "head.head_dist")),  # "head" would be both, to PEFT, and the outer one again
    ],
)
def test_heads_are_what_makes_the_logits(name, heads):
    model = make(name)
    assert classifiers(model) == heads
    classes = classify(model)
    inside = [n for n in classes.roles if any(n == h or n.startswith(h + ".") for h in heads)]
    assert [n for n, role in classes.roles.items() if role == "head"] == inside
    assert len(inside) == len(heads)


def test_a_backbone_has_no_head():
    assert classifiers(make("test_resnet", num_classes=0)) == ()
    for name in ("test_resnet", "test_vit"):
        features = make(name, features_only=True)
        assert classifiers(features) == ()
        assert "head" not in classify(features).roles.values()


def test_the_first_convolution_counts_by_its_whole_name():
    classes = classify(make("resnet18"))
    assert [n for n, r in classes.roles.items() if r == "embedding"] == ["conv1"]
    assert classes.roles["layer1.0.conv1"] == "conv"


@pytest.mark.parametrize(
    "name, first", [("test_resnet", "conv1_0"), ("test_convnext", "stem_0"), ("test_vit", "model.patch_embed.proj")]
)
def test_the_first_convolution_of_a_renamed_backbone(name, first):
    classes = classify(make(name, features_only=True))
    found = [n for n, r in classes.roles.items() if r == "embedding"]
    assert [n.replace(".", "_") for n in found] == [first.replace(".", "_")]


def test_patch_embeddings_but_not_the_network_inside_one():
    hybrid = classify(make("vit_tiny_r_s16_p8_224"))
    assert hybrid.roles["patch_embed.proj"] == "embedding"
    vitamin = classify(make("vitamin_small_224"))
    assert vitamin.roles["patch_embed.backbone.stages.0.0.conv1_1x1"] == "conv"
    assert classify(make("gemma4_vit_167m", depth=1)).roles["encoder.patch_embed.input_proj"] == "embedding"


def test_proj_is_an_embedding_an_output_a_merge_or_a_position_by_where_it_is():
    classes = classify(make("hiera_tiny_224"))
    roles = {classes.roles[n] for n in classes.roles if n.endswith("proj")}
    assert roles == {"embedding", "o", "other"}
    assert classify(make("convit_tiny")).roles["blocks.0.attn.pos_proj"] == "other"


def test_q_k_and_v_under_their_many_names():
    assert ends(classify(make("crossvit_tiny_240")), "q") == {"wq"}
    mobile = classify(make("mobilenetv4_hybrid_medium_075"))
    assert {n.split(".")[-2] for n, r in mobile.roles.items() if r == "k"} == {"key"}
    assert all("down" not in n for n, r in mobile.roles.items() if r == "k")  # the pooling before it is "conv"
    eva = classify(make("vit_tiny_patch16_dinov3_qkvb", qkv_fused=False))
    assert "qkv" not in eva.roles.values()
    assert (ends(eva, "q"), ends(eva, "k"), ends(eva, "v")) == ({"q_proj"}, {"k_proj"}, {"v_proj"})


def test_a_projection_named_qkv_may_hold_keys_and_values_only():
    model = make("gcvit_xxtiny")
    classes = classify(model)
    wide = {
        classes.roles[n]: m.out_features // m.in_features for n, m in candidates(model).items() if n.endswith(".qkv")
    }
    assert wide == {"qkv": 3, "kv": 2}
    assert classes.roles["stages.0.blocks.0.mlp.fc1"] == "mlp"


def test_gates_and_position_biases_are_no_feed_forward_layers():
    byob = classify(make("test_byobnet"))
    assert {byob.roles[n] for n in byob.roles if n.endswith(("attn.fc1", "attn.fc2", "attn_last.fc1"))} == {"other"}
    swin = classify(make("swinv2_tiny_window8_256"))
    assert {swin.roles[n] for n in swin.roles if ".cpb_mlp." in n} == {"other"}
    assert {swin.roles[n] for n in swin.roles if ".mlp." in n} == {"mlp"}
    split = classify(make("resnest14d"))
    assert split.roles["layer1.0.conv2.conv"] == "conv"
    assert split.roles["layer1.0.conv2.fc1"] == "other"


@pytest.mark.parametrize(
    "name, default",
    [
        ("test_vit", "attention+mlp"),
        ("swin_tiny_patch4_window7_224", "attention+mlp"),
        ("test_resnet", "conv"),
        ("convnext_base", "mlp"),  # depthwise and downsampling convolutions hold 4 %
        ("gmlp_ti16_224", "mlp"),
        ("test_coatnet", "attention+mlp+conv"),
        ("vgg11", "mlp+conv"),
    ],
)
def test_the_default_takes_what_holds_the_weights(name, default):
    model = make(name)
    assert classify(model).default == default
    assert {layer.role for layer in la.plan(model, rank=1).layers}.isdisjoint({"head", "embedding"})


def test_what_can_not_carry_an_adapter_is_said():
    notes = classify(make("sequencer2d_s")).notes
    assert any("LSTM" in note for note in notes)
    assert any("CondConv2d" in note for note in classify(make("efficientnet_cc_b0_4e")).notes)


def test_a_target_map_comes_before_structure():
    mine = TargetMap("timm", ("VisionTransformer",), roles={"other": (r"\.mlp\.fc1$",)}, default="other")
    classes = classify(make("test_vit"), [mine])
    assert classes.default == "other"
    assert {n.rpartition(".")[2] for n, r in classes.roles.items() if r == "other"} == {"fc1"}
    assert classes.roles["blocks.0.mlp.fc2"] == "mlp"


def test_asking_for_what_is_not_there_says_what_is():
    with pytest.raises(NoTargetError, match=r"conv \("):
        la.plan(make("test_resnet"), targets="attention")
