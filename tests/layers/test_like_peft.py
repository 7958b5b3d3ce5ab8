"""Fused layers against PEFT's own forward, in fp32: outputs and every gradient to 1e-5 of their norm."""

import copy

import pytest
import torch
from helpers import perturb
from layer_checks import adapted, assert_like, assert_like_peft, no_parent, outcome
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_adapters as la
from lora_adapters.layers.routes import route
from lora_adapters.weights import Bnb4bit


def data(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def indices(*shape):
    return torch.randint(0, 24, shape, generator=torch.Generator().manual_seed(1))


FOURBIT = {
    "nf4": Bnb4bit("nf4", 64, True),
    "nf4 plain": Bnb4bit("nf4", 64, False),
    "fp4": Bnb4bit("fp4", 128, True),
    "fp4 plain": Bnb4bit("fp4", 64, False),
    "nf4 stored as fp32": Bnb4bit("nf4", 64, True, torch.float32),
}
# name: (module, input, quantization, path)
LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), data(3, 7, 24), None, "split"),
    "linear without bias": (lambda: nn.Linear(24, 40, bias=False), data(7, 24), None, "split"),
    "linear, one row": (lambda: nn.Linear(24, 40), data(24), None, "split"),
    "linear, five dimensions": (lambda: nn.Linear(24, 40), data(2, 1, 3, 2, 24), None, "split"),
    "linear, no rows": (lambda: nn.Linear(24, 40), data(0, 24), None, "split"),
    "linear, strided input": (lambda: nn.Linear(24, 40), data(24, 3, 7).transpose(0, 2), None, "split"),
    "transformers Conv1D": (lambda: Conv1D(40, 24), data(3, 7, 24), None, "split"),
    "embedding": (lambda: nn.Embedding(24, 40), indices(3, 7), None, "beside"),
    "embedding with padding": (lambda: nn.Embedding(24, 40, padding_idx=3), indices(3, 70), None, "beside"),
    "embedding of one": (lambda: nn.Embedding(24, 40), indices(), None, "beside"),
    "int8": (lambda: nn.Linear(64, 40), data(3, 7, 64), "int8", "beside"),
    "a plugin's int4": (lambda: nn.Linear(25, 40), data(3, 7, 25), "int4-rows", "merged"),
    **{
        f"{name}, {width} wide": (lambda width=width: nn.Linear(width, 40), data(3, 9, width), quantizer, "merged")
        for name, quantizer in FOURBIT.items()
        for width in (64, 96)
    },
}
CONVS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": "same", "kernel_size": 4},
    {"padding": "valid", "bias": False},
    {"groups": 4, "padding": 1},
    {"groups": 2, "kernel_size": 2, "padding": 1},
    {"groups": 2, "padding": 2, "stride": 3, "dilation": 2},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "circular", "groups": 2},
    {"padding": "same", "padding_mode": "replicate"},
]


def conv(dims, settings):
    torch.manual_seed(0)
    return (nn.Conv1d if dims == 1 else nn.Conv2d)(8, 12, **{"kernel_size": 3, **settings})


@pytest.mark.parametrize("dropouts", [(0.0,), (0.3,), (0.5, 0.1, 0.0)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_linear_and_embedding(name, dropouts):
    module, x, quantization, path = LAYERS[name]
    torch.manual_seed(0)
    model, layer = adapted(module(), dropouts, quantization=quantization)
    assert_like_peft(model, layer, x, path)
    assert_like_peft(model, layer, x, train=False)


@pytest.mark.parametrize("quantization", [None, "nf4", FOURBIT["fp4 plain"]], ids=["dense", "nf4", "fp4 plain"])
@pytest.mark.parametrize("settings", CONVS, ids=str)
@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions(dims, settings, quantization):
    x = data(2, 8, *(13, 11)[:dims])
    padded = settings.get("padding_mode", "zeros") != "zeros" or settings.get("kernel_size") == 4
    for dropouts in ((0.0,), (0.3, 0.1)):
        model, layer = adapted(conv(dims, settings), dropouts, quantization=quantization)
        if padded and len(dropouts) == 2:
            # PEFT drops values before it pads: that one is left to it.
            layer.fused, want = False, outcome(model, x)
            layer.fused = True
            assert_like(outcome(model, x), want, 1e-6 if next(model.parameters()).is_cuda else 0)
        else:
            assert_like_peft(model, layer, x, "merged" if quantization else "split")
        assert_like_peft(model, layer, x, train=False)


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_channels_last(quantization, dropout):
    model, layer = adapted(
        conv(2, {"padding": 1}).to(memory_format=torch.channels_last), (dropout,), quantization=quantization
    )
    assert_like_peft(model, layer, data(2, 8, 9, 7).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("dims", [1, 2])
def test_an_input_without_batch(dims):
    model, layer = adapted(conv(dims, {"padding": 1}))
    x = data(8, *(9, 7)[:dims])
    layer.fused, want = False, outcome(model, x)
    layer.fused = True
    assert_like(outcome(model, x), want)


MORE = ["linear", "transformers Conv1D", "embedding with padding", "int8", "a plugin's int4", "nf4, 96 wide"]


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("option", [{"use_rslora": True}, {"lora_bias": True}, {"bias": "lora_only"}, {}], ids=str)
def test_options(name, option):
    module, x, quantization, _ = LAYERS[name]
    if "embedding" in name and option.keys() & {"lora_bias", "bias"}:
        return  # embeddings have no bias
    # PEFT allows one adapter only where the base's own biases are trained.
    dropouts = (0.2,) if "bias" in option else (0.0, 0.2)
    model, layer = adapted(module(), dropouts, quantization=quantization, **option)
    biases = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    assert len(biases) == {"lora_bias": 2, "bias": 1}.get(next(iter(option), ""), 0)
    assert_like_peft(model, layer, x)


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("option", [{"use_rslora": True}, {"lora_bias": True}, {"bias": "lora_only"}], ids=str)
def test_options_of_convolutions(quantization, option):
    for settings in ({"padding": 1}, {"bias": False}, {"groups": 2}):
        dropouts = (0.0,) if "bias" in option else (0.0, 0.0)
        model, layer = adapted(conv(2, settings), dropouts, quantization=quantization, **option)
        assert_like_peft(model, layer, data(2, 8, 9, 7))


@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize("name", ["linear", "transformers Conv1D", "embedding", "nf4, 64 wide", "conv"])
@pytest.mark.parametrize("frozen", ["", "lora_A", "lora_B", "lora_"])
def test_what_trains(name, frozen, train_weight):
    module, x, quantization, _ = LAYERS.get(name, (lambda: conv(2, {"padding": 1}), data(2, 8, 9, 7), None, ""))
    model, layer = adapted(module(), quantization=quantization)
    if train_weight and not quantization:
        layer.base_layer.weight.requires_grad_()
    for key, parameter in layer.named_parameters():
        if frozen and key.replace("embedding_", "").startswith(frozen):
            parameter.requires_grad_(False)
    path = {True: "beside", False: None}[bool(train_weight and not quantization)]
    for x_grad in (True, False):
        assert_like_peft(model, layer, x, path, x_grad=x_grad)


@pytest.mark.parametrize("name", [*MORE, "conv"])
def test_some_active_none_active_disabled_merged(name):
    module, x, quantization, _ = LAYERS.get(name, (lambda: conv(2, {"padding": 1}), data(2, 8, 9, 7), None, ""))
    model, layer = adapted(module(), (0.0, 0.0, 0.0), quantization=quantization)
    x = x.to(next(model.parameters()).device)
    for names in (["third"], ["third", "default"], ["second", "second"]):
        layer._active_adapter = names
        assert_like_peft(model, layer, x)
    layer._active_adapter = []
    assert route(layer).reason.startswith("no active adapter")
    bare = outcome(model, x)["y"]
    assert torch.equal(bare, layer.base_layer(x))
    layer.set_adapter(["default", "second"])
    layer.enable_adapters(False)
    assert route(layer).reason.startswith("its adapters are disabled")
    assert torch.equal(outcome(model, x)["y"], bare)
    layer.enable_adapters(True)
    layer.set_adapter(["default", "second"])
    with torch.no_grad():
        with no_parent(layer):
            want = model(x)
        layer.merge()
        assert route(layer).reason.startswith("merged")
        # On a GPU INT8 rounds the input, too, which a merged layer does not.
        coarse = 5e-2 if name == "int8" and x.is_cuda else 1e-4
        torch.testing.assert_close(model(x), want, rtol=coarse, atol=coarse)
        layer.unmerge()
        with no_parent(layer):
            assert torch.equal(model(x), want)


STOCK = {
    "linear": (lambda: nn.Linear(24, 40), data(3, 7, 24), {}),
    "transformers Conv1D": (lambda: Conv1D(40, 24), data(3, 7, 24), {"fan_in_fan_out": True}),
    "embedding": (lambda: nn.Embedding(24, 40, padding_idx=3), indices(3, 7), {}),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), data(2, 8, 9), {}),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, stride=2), data(2, 8, 9, 7), {}),
}


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", STOCK)
def test_against_a_model_that_peft_alone_made(name, dropout):
    module, x, options = STOCK[name]
    torch.manual_seed(0)
    plain = nn.Sequential(module())
    ours, config = (
        copy.deepcopy(plain),
        LoraConfig(r=5, lora_alpha=8, target_modules=["0"], lora_dropout=dropout, **options),
    )
    theirs = get_peft_model(plain, config)
    assert type(theirs.base_model.model[0]).__module__.startswith("peft.")
    la.attach(ours, rank=5, alpha=8, targets=["0"], dropout=dropout)
    perturb(theirs)
    perturb(ours)
    want = outcome(theirs, x)
    with no_parent(ours[0]):
        got = outcome(ours, x)
    assert [v.abs().max() > 0 for v in want.values() if v is not None] == [True] * (len(want) - (name == "embedding"))
    assert_like(dict(zip(want, got.values(), strict=True)), want)


def test_grouped_convolution_that_peft_alone_made():
    """There A spans all channels and B is grouped: other arithmetic than where we make the layer."""
    for dropout in (0.0, 0.3):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], lora_dropout=dropout)
        with pytest.warns(UserWarning, match="groups > 1"):
            model = get_peft_model(nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=2)), config)
        perturb(model)
        x = data(2, 8, 9, 7)
        want = outcome(model, x)
        assert la.optimize(model).layers
        layer = model.base_model.model[0]
        with no_parent(layer):
            got = outcome(model, x)
        assert_like(got, want)
