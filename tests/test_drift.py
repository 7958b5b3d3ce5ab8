"""Drift of models of any backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_adapters.drift import measure_drift
from lora_adapters.errors import RequestError, UnsupportedError

pytest.importorskip("bitsandbytes")


def test_a_language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=100)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=7)).train()
    report = measure_drift(model)
    assert {part.part for part in report.parts} == {"attention", "mlp"}
    assert 0 < report.total.error < 1
    thirds = measure_drift(model, by="block", inputs=[{"input_ids": torch.arange(9)[None]}])
    assert {part.part for part in thirds.parts} == {"model.layers.0-2", "model.layers.3-4", "model.layers.5-6"}
    assert model.training


def test_a_plain_module_by_any_parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    inputs = [{"input": torch.randn(8, 64)} for _ in range(2)]
    report = measure_drift(model, {"all-linear": "nf4"}, by=lambda name: f"layer {name}", inputs=inputs)
    assert {part.part: part.layers for part in report.parts} == {"layer 0": 1, "layer 2": 1}
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(RequestError, match="not finite"):
        measure_drift(model, inputs=inputs)


def test_models_that_can_not_be_measured():
    with torch.device("meta"), pytest.raises(RequestError, match="meta device"):
        measure_drift(nn.Linear(64, 64), inputs=[{"input": torch.zeros(1, 64)}])
    hooked = nn.Sequential(nn.Linear(64, 64))
    hooked.forward = lambda input: input
    with pytest.raises(RequestError, match="hooks"):
        measure_drift(hooked, inputs=[{"input": torch.zeros(1, 64)}])
    with pytest.raises(UnsupportedError, match="output="):
        measure_drift(Counts(), inputs=[{"x": torch.zeros(1, 64)}])


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return len(self.layer(x))
