"""Layers whose input comes by the name torch has for it, as diffusers' motion modules pass it."""

import pytest
import torch
from torch import nn

import lora_adapters as la


@pytest.mark.parametrize("layer, shape", [(nn.Linear(6, 5), (3, 6)), (nn.Conv2d(6, 5, 3), (2, 6, 7, 7))])
@pytest.mark.parametrize("fused", ["auto", False])
def test_input_by_name(layer, shape, fused):
    model = nn.ModuleDict({"layer": layer})
    la.attach(model, rank=2, targets=["layer"], fused=fused, init_lora_weights=False)
    x = torch.randn(shape)
    assert torch.equal(model["layer"](input=x), model["layer"](x))
    assert torch.equal(model["layer"](x=x), model["layer"](x))
    with pytest.raises(TypeError):
        model["layer"]()
