"""What the tests of the fused layers share: one layer, run once as PEFT would and once fused."""

from contextlib import contextmanager
from unittest import mock

import torch
from helpers import perturb
from torch import nn

import lora_adapters as la

#: Where the layers run; tests/gpu/test_layers_gpu.py runs the same tests on a GPU.
DEVICE = "cpu"


def adapted(module, dropouts=(0.0,), ranks=(5, 3, 2), quantization=None, values=True, **options):
    """Return a model around one adapted module, and its LoRA layer: one adapter for each dropout, all active."""
    model = nn.Sequential(module).to(DEVICE)
    names = ["default", "second", "third"][: len(dropouts)]
    for name, rank, dropout in zip(names, ranks, dropouts, strict=False):
        settings = {"alpha": rank * 1.7, "dropout": dropout, **options}
        la.attach(model, rank=rank, targets=["0"], adapter_name=name, quantization=quantization, **settings)
        quantization = None
    model[0].set_adapter(names)
    if values:
        perturb(model)
    return model, model[0]


def stock_class(layer):
    """PEFT's own class of a layer."""
    return next(c for c in type(layer).__mro__ if c.__module__.startswith("peft.") and "forward" in vars(c))


@contextmanager
def no_parent(layer):
    """Fail if PEFT's forward runs: without this, a test of the fused path might compare PEFT with itself."""
    with mock.patch.object(stock_class(layer), "forward", side_effect=AssertionError("PEFT's forward ran")):
        yield


def outcome(model, x, train=True, seed=0, auto=None, x_grad=True):
    """Return the output, and the gradients of the input and of every parameter that trains, by name."""
    model.train(train)
    model.zero_grad()
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    x = x.detach().to(device)
    if x.is_floating_point():
        x = x.requires_grad_(x_grad)
    with torch.autocast(device.type, dtype=auto, enabled=auto is not None):
        y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    if y.requires_grad:
        y.backward(dy.to(device, y.dtype))
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **found}


def error(got, want):
    """The norm of the difference over the norm of what is wanted."""
    size = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / max(size, 1e-30)


def assert_like(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        mine = got[name]
        assert (mine is None) == (expected is None), name
        if expected is not None:
            assert (mine.dtype, mine.shape) == (expected.dtype, expected.shape), name
            assert error(mine, expected) <= tolerance, (name, error(mine, expected))


def assert_like_peft(model, layer, x, path=None, tolerance=1e-5, **options):
    """Assert that the fused forward runs, by this path, and gives what PEFT's forward gives."""
    from lora_adapters.layers.routes import route

    if path is not None:
        assert route(layer).path == path, route(layer)
    layer.fused = False
    want = outcome(model, x, **options)
    layer.fused = True
    with no_parent(layer):
        got = outcome(model, x, **options)
    assert_like(got, want, tolerance)
