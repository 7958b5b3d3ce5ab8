"""bitsandbytes' repacking of 4-bit weights on CPUs with AVX512-BF16, forced on whatever CPU runs the tests.

The repacking itself is plain PyTorch and runs everywhere; only the kernel that reads the repacked weight needs the
instructions, so without them the outputs of a repacked layer mean nothing and are not looked at.
"""

import copy

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_adapters as la
from lora_adapters.errors import LoraAdaptersWarning, UnsupportedError
from lora_adapters.inject import planned_on_meta
from lora_adapters.weights import Bnb4bit, Nf4, guard_cpu_repacking, store_for
from lora_adapters.weights.linear4bit import Linear4bit


def stock(shape=(128, 64), nested=True, quant_type="nf4", storage=torch.uint8):
    """A Linear4bit as transformers or a user makes it, on a CPU that has the instructions."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        *shape, compute_dtype=torch.float32, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    layer.to("cpu")
    layer.support_avx512bf16_for_cpu = True
    return layer


def evaluate(layer):
    with torch.no_grad():
        return layer.eval()(torch.randn(2, layer.in_features))


def check_gradient(layer, weight, tolerance=1e-5):
    x = torch.randn(3, layer.in_features, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert (y - F.linear(x, weight, layer.bias)).abs().max() < tolerance
    assert (x.grad - grad @ weight).abs().max() < tolerance


def test_the_private_names_and_the_trap_are_still_there():
    """A canary. If it fails, bitsandbytes changed: look whether guard_cpu_repacking is still needed and still works."""
    assert callable(bnb.nn.modules._convert_weight_packed_for_cpu_inverse)
    layer = stock()
    layer.bias = None
    weight = store_for(layer).read()
    evaluate(layer)
    assert layer.weight.quant_state.packing_format_for_cpu
    x = torch.randn(2, 128, requires_grad=True)
    y = layer.train()(x).sum()
    # With the instructions there is no gradient; without them the kernel's stand-in differentiates a wrong layout.
    (dx,) = torch.autograd.grad(y, x, allow_unused=True) if y.requires_grad else (None,)
    assert dx is None or not torch.allclose(dx, weight.sum(0).expand(2, -1), atol=0.1)


class OwnForward(bnb.nn.Linear4bit):
    """Somebody's subclass."""


def test_classes_that_cannot_be_mended_are_named():
    model = nn.ModuleDict({"theirs": OwnForward(96, 64).to("cpu"), "stock": bnb.nn.LinearNF4(96, 64).to("cpu")})
    with pytest.warns(LoraAdaptersWarning, match="theirs is a OwnForward with in_features 96"):
        assert guard_cpu_repacking(model) == 2
    assert type(model["theirs"]) is OwnForward
    assert type(model["stock"]) is Linear4bit
    whole = bnb.nn.LinearNF4(128, 64).to("cpu")
    guard_cpu_repacking(whole)
    assert type(whole) is bnb.nn.LinearNF4


@pytest.mark.parametrize("shape", [(128, 64), (64, 64), (192, 32), (96, 64), (64, 33), (33, 32), (100, 7)])
@pytest.mark.parametrize("nested", [True, False])
def test_train_eval_train_with_the_guard(shape, nested):
    layer = stock(shape, nested)
    weight = store_for(layer).read()
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"deep": layer}))
    assert guard_cpu_repacking(model) == 1
    check_gradient(layer.train(), weight)
    assert torch.allclose(layer.eval()(torch.ones(1, shape[0])), F.linear(torch.ones(1, shape[0]), weight, layer.bias))
    evaluate(layer)
    check_gradient(layer.train(), weight)
    evaluate(copy.deepcopy(layer))
    assert torch.equal(store_for(layer).read(), weight)


@pytest.mark.parametrize("shape", [(96, 64), (100, 64), (64, 33), (33, 32)])
def test_sizes_that_repacking_raises_for_work_once_guarded_even_afterwards(shape):
    layer = stock(shape)
    weight = store_for(layer).read()
    with pytest.raises((RuntimeError, AssertionError)):
        evaluate(layer)
    guard_cpu_repacking(layer)
    assert torch.equal(store_for(layer).read(), weight)
    evaluate(layer)
    check_gradient(layer.train(), weight)
    assert copy.deepcopy(layer).state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize("shape", [(128, 64), (64, 96), (256, 32)])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_repacked_layer_is_mended(shape, nested, quant_type, storage):
    layer = stock(shape, nested, quant_type, storage)
    weight, values = store_for(layer).read(), layer.weight.view(torch.uint8).clone()
    keys, nbytes = layer.state_dict().keys(), store_for(layer).nbytes
    evaluate(layer)
    assert layer.weight.quant_state.packing_format_for_cpu
    read = store_for(layer).read()
    assert layer.weight.quant_state.packing_format_for_cpu, "reading must not change the layer"
    assert guard_cpu_repacking(layer) == 1
    assert torch.equal(layer.weight.view(torch.uint8), values), "the 4-bit values come back exactly"
    mended = store_for(layer).read()
    assert torch.equal(read, mended)
    # The maxima went through bf16, and nested ones were quantized to 8 bits once more.
    tolerance = 0.02 if nested else 2**-8
    assert (mended - weight).abs().max() <= tolerance * weight.abs().max()
    assert (layer.state_dict().keys(), store_for(layer).nbytes) == (keys, nbytes)
    check_gradient(layer.train(), mended)
    evaluate(layer)
    check_gradient(layer.train(), mended)


def test_write_to_a_repacked_layer():
    layer = stock()
    evaluate(layer)
    store_for(layer).write(torch.full((64, 128), 0.5))
    assert torch.allclose(store_for(layer).read(), torch.full((64, 128), 0.5), atol=1e-3)
    check_gradient(layer.train(), store_for(layer).read())


def test_without_the_private_name_the_error_says_what_to_do(monkeypatch):
    layer = stock()
    evaluate(layer)
    monkeypatch.delattr(bnb.nn.modules, "_convert_weight_packed_for_cpu_inverse")
    with pytest.raises(UnsupportedError, match="Load the model again"):
        guard_cpu_repacking(layer)
    assert not layer.support_avx512bf16_for_cpu


@pytest.mark.parametrize("quantizer", [Nf4(), Bnb4bit("fp4", 128, False)], ids=str)
def test_our_quantizers_guard_what_they_make(quantizer, monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    assert bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu, "the flag is forced"
    layer = quantizer.quantize(nn.Linear(96, 64), torch.float32)
    weight = store_for(layer).read()
    evaluate(layer)
    check_gradient(layer.train(), weight)
    assert guard_cpu_repacking(nn.Linear(2, 2)) == 0


class TwoLayers(nn.Module):
    """A model of two 4-bit layers that its user quantized; one of them has a size that bitsandbytes gets wrong."""

    def __init__(self):
        super().__init__()
        self.first, self.second = stock((96, 128)), stock((128, 64))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("restored", [False, True])
def test_attaching_to_a_base_that_the_user_loaded_guards_every_layer(restored, tmp_path):
    """Train, evaluate, train: the adapted and the bare layer compute with the weights they hold, and pass dX on."""
    model = TwoLayers()
    weights = [store_for(layer).read() for layer in (model.first, model.second)]
    adapter = la.attach(model, rank=4, targets=["first"])
    if restored:
        adapter.save(tmp_path)
        adapter.detach()
        model = TwoLayers()
        adapter = la.restore(model, tmp_path)
    biases = [model.first.get_base_layer().bias.detach(), model.second.bias.detach()]
    for _ in range(2):
        x = torch.randn(3, 96, requires_grad=True)
        expected = F.linear(torch.tanh(F.linear(x, weights[0], biases[0])), weights[1], biases[1])
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        y = model.train()(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dx, wanted, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-4)
    adapter.detach()
    assert not any(layer.support_avx512bf16_for_cpu for layer in (model.first, model.second))


def test_a_twin_on_the_meta_device_leaves_a_repacked_base_alone():
    model = nn.Sequential(stock((128, 128)))
    evaluate(model[0])
    packed = model[0].weight.data.clone()
    planned_on_meta(model, la.plan(model, rank=4))
    assert model[0].weight.quant_state.packing_format_for_cpu
    assert torch.equal(model[0].weight.data, packed)
