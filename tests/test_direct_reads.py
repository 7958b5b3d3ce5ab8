"""A layer whose weight is read without a call is refused or called: an adapter is never there for nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, perturb, state
from torch import nn

import lora_adapters as la
from lora_adapters.errors import UnsupportedError


class Tied(nn.Module):
    """The output layer is the embedding's weight, used without a call; so is `scale` of its block."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"emb": nn.Embedding(20, 16), "mid": nn.Linear(16, 16)})
        self.block = Block(self.body["mid"])

    def forward(self, ids):
        return F.linear(self.block(self.body.emb(ids)), self.body.emb.weight)


class Block(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.read, self.called = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(module, x):
        return module._mix(module.called(x.to(module.called.weight.dtype)))

    def _mix(self, x):
        return x @ self.read.weight

    def reset_parameters(self):
        self.called.weight.data.zero_()


IDS = torch.arange(6).reshape(2, 3)


def test_they_are_left_out_and_the_plan_says_who_reads_them():
    plan = la.plan(Tied(), rank=2)
    assert [layer.name for layer in plan.layers] == ["body.mid", "block.called"]
    reasons = {layer.name: layer.reason for layer in plan.skipped}
    assert reasons["block.read"].startswith("Block._mix reads its weight without calling it")
    assert reasons["body.emb"].startswith("Tied.forward reads its weight without calling it")


@pytest.mark.parametrize("name", ["emb", "block.read"])
def test_asking_for_one_by_name_is_refused(name):
    model = Tied()
    before = state(model)
    with pytest.raises(UnsupportedError, match="reads its weight without calling it"):
        la.attach(model, rank=2, targets=[name])
    assert_same(model, before)


def test_a_method_that_rebuilds_the_layers_does_not_count():
    class Fusing(nn.Module):
        """As diffusers' Attention, whose fuse_projections makes one layer of three."""

        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(16, 16)

        def forward(self, x):
            return self.to_q(x)

        def fuse_projections(self):
            self.to_qkv = nn.Linear(16, 16)
            self.to_qkv.weight.copy_(self.to_q.weight)

    assert [layer.name for layer in la.plan(Fusing(), rank=2).layers] == ["to_q"]


def test_a_read_under_another_name_counts():
    class Reads(Block):
        def forward(self, x):
            return F.linear(x, self.shared.weight)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mid = nn.Linear(16, 16)
            self.block = Reads(self.mid)

    plan = la.plan(Model(), rank=2, targets=["called"])
    assert any(x.name == "mid" and x.reason.startswith("Reads.forward") for x in plan.skipped)


def test_what_stays_is_trained_and_merges_to_the_same():
    model = Tied()
    adapter = la.attach(model, rank=2, targets=["called"])
    perturb(model)
    output = model(IDS)
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    adapter.merge()
    torch.testing.assert_close(model(IDS), output)


# ---- torch.nn.TransformerEncoderLayer: a fused kernel reads its layers' weights in evaluation ------------------------


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, **options).eval()


X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def without_gradients(model, **options):
    with torch.no_grad():
        return model(X, **options)


def test_multihead_attention_keeps_its_output_layer():
    plan = la.plan(encoder(), rank=2)
    assert {layer.name.rpartition(".")[2] for layer in plan.layers} == {"linear1", "linear2"}
    assert all("MultiheadAttention" in layer.reason for layer in plan.skipped)
    with pytest.raises(UnsupportedError, match="MultiheadAttention reads its weight"):
        la.plan(encoder(), rank=2, targets=["out_proj"])


@pytest.mark.parametrize("targets", ["all-linear", ["layers.0.linear1"]])
@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "orthogonal"}], ids=["direct", "peft"])
def test_evaluation_uses_the_adapter(options, targets):
    model = encoder()
    before, plain = state(model), without_gradients(model)
    adapter = la.attach(model, rank=2, targets=targets, **options)
    perturb(model)
    output = model(X).detach()
    assert (output - plain).abs().max() > 0.01
    torch.testing.assert_close(without_gradients(model), output)
    adapter.merge()
    torch.testing.assert_close(without_gradients(model), output)
    adapter.unmerge()
    padded = without_gradients(model, src_key_padding_mask=PADDED)
    torch.testing.assert_close(padded[~PADDED], model(X, src_key_padding_mask=PADDED).detach()[~PADDED])
    plain_model = copy.deepcopy(model)
    adapter.detach()
    assert_same(model, before)
    torch.testing.assert_close(without_gradients(model), plain)
    assert plain_model.layers[0].linear1.lora_A  # a copy carries on by itself
    torch.testing.assert_close(without_gradients(plain_model), output)


def test_the_plain_model_has_its_fused_kernel_back():
    model = encoder()
    adapter = la.attach(model, rank=2)
    perturb(model)
    output = model(X).detach()
    adapter.merge(unload=True)
    assert not any(m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(without_gradients(model), output)


def test_without_the_hook_the_kernel_would_pass_the_adapter_over():
    """If this fails, torch's kernel knows adapters by now (or is gone), and the hook can go."""
    model = encoder()
    la.attach(model, rank=2)
    perturb(model)
    output = model(X).detach()
    for layer in model.modules():
        layer._forward_pre_hooks.clear()
    assert (without_gradients(model) - output).abs().max() > 0.01


def test_packed_weights_are_called_too():
    model = encoder()
    adapter = la.attach(model, rank=2, targets=["layers.0.linear1"], quantization="nf4")
    assert len(adapter.plan.quantize) == 4
    perturb(model)
    torch.testing.assert_close(without_gradients(model), model(X).detach(), rtol=1e-4, atol=1e-4)
    adapter.detach()
    torch.testing.assert_close(without_gradients(model), model(X).detach(), rtol=1e-4, atol=1e-4)
