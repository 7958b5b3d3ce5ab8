"""What stays dense in 4 bits."""

from __future__ import annotations

import timm
import torch
from lora_adapters_timm.dense import TINY, dense_layers

import lora_adapters as la
from lora_adapters.quantized import quantized_layers


def make(name: str, **options):
    with torch.device("meta"):
        return timm.create_model(name, **{"num_classes": 5, **options})


def test_depthwise_and_tiny_layers_heads_and_the_first_convolution_stay_dense():
    model = make("efficientnet_b0")
    packed = quantized_layers(model, "nf4")
    roles = {layer.name: layer.role for layer in la.plan(model, targets="conv+other", rank=1).layers}
    layers = dict(model.named_modules())
    for name, role in roles.items():
        layer = layers[name]
        depthwise = layer.groups == layer.in_channels > 1
        assert (name in packed) == (not depthwise and layer.weight.numel() >= TINY), name
        assert role in ("conv", "other")
    assert "conv_stem" not in packed
    assert "classifier" not in packed


def test_names_are_whole_names():
    model = make("test_resnet")  # conv1.0 is tiny; layer1.0.conv1 is not
    packed = quantized_layers(model, "nf4")
    assert "conv1.0" in set(dense_layers(model))
    assert "layer1.0.conv1" in packed


def test_an_embedding_is_packed_if_it_is_asked_for():
    model = make("test_vit")
    assert "patch_embed.proj" not in quantized_layers(model, "nf4")
    assert set(quantized_layers(model, {"embedding": "nf4"})) == {"patch_embed.proj"}


def test_most_of_a_network_is_packed():
    for name, share in (
        ("resnet50", 0.9),
        ("efficientnet_b0", 0.7),
        ("convnext_base", 0.95),
        ("vit_base_patch16_224", 0.97),
    ):
        model = make(name, num_classes=1000)
        layers, packed = dict(model.named_modules()), quantized_layers(model, "nf4")
        assert sum(layers[n].weight.numel() for n in packed) > share * sum(p.numel() for p in model.parameters()), name
