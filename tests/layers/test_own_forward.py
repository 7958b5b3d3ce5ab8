"""Linear layers and convolutions whose class has a forward of its own: it runs on the effective weight, as after merging."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, perturb, state
from layer_checks import adapted, assert_like, error, outcome
from torch import nn

import lora_adapters as la
from lora_adapters.errors import UnsupportedError
from lora_adapters.layers import effective
from lora_adapters.layers.probe import multiplies_its_input
from lora_adapters.layers.routes import route
from lora_adapters.weights import store_for

timm_layers = pytest.importorskip("timm.layers")
SAME = pytest.importorskip("timm.layers.conv2d_same").Conv2dSame


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Called(nn.Linear):
    def __call__(self, *args):
        return 2 * super().__call__(*args)


class Normed(nn.Linear):
    def forward(self, input):
        return F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Shifted(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input + 1, weight, bias)


class Causal(nn.Conv1d):
    """Pads on the left by itself, twice over its own kernel."""

    def forward(self, input):
        return super().forward(F.pad(input, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class Standardised(nn.Conv1d):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1), 1.5))

    def forward(self, input):
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        weight = self.gain * weight / (self.weight.var((1, 2), keepdim=True) + 1e-3).sqrt()
        return F.conv1d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def timm_class(name):
    return getattr(timm_layers, name)


LINEARS = {"doubled": Doubled, "called": Called, "normed": Normed, "timm": timm_class("Linear")}
CONVS = {
    "shifted": Shifted,
    "causal": Causal,
    "standardised": Standardised,
    "same": SAME,
    **{name: timm_class(name) for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")},
}
GEOMETRIES = [
    {},
    {"stride": 2},
    {"dilation": 2, "bias": False},
    {"groups": 4, "stride": 2, "dilation": 2},
    {"groups": 8, "stride": 3},
]
FOLLOWED = ("doubled", "called", "timm", "shifted", "causal", "same")


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(name, **geometry):
    """Return a module and an input."""
    torch.manual_seed(0)
    if name in LINEARS:
        return LINEARS[name](24, 40), data(3, 7, 24)
    module = CONVS[name](8, 16, 3, **geometry)
    return module, data(2, 8, 13) if isinstance(module, nn.Conv1d) else data(2, 8, 13, 10)


def naive(model, layer, x):
    """The output and the gradients of x, A and B of the class's own forward on W + sum s B A, by autograd alone."""
    base = layer.base_layer
    dense = store_for(base).dense_module(store_for(base).read())
    names = [n for n in ("default", "second", "third") if n in layer.lora_A]
    leaves, weight = {}, dense.weight.detach()
    for name in names:
        a, b = (p.detach().clone().requires_grad_() for p in layer.factor_parameters(name))
        leaves |= {f"0.lora_A.{name}.weight": a, f"0.lora_B.{name}.weight": b}
        weight = weight + (layer.scaling[name] * b.flatten(1) @ a.flatten(1)).view(weight.shape)
    x = x.clone().requires_grad_()
    y = torch.func.functional_call(dense, {"weight": weight}, (x,))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in leaves.items()}}


def check(model, layer, x, tolerance=1e-5):
    """Forward and gradients, then merging and unmerging."""
    assert route(layer).path == "substituted"
    want = naive(model, layer, x)
    assert_like(outcome(model, x), want, tolerance)
    layer.fused = False
    assert_like(outcome(model, x), want, tolerance)
    layer.fused = True
    base = layer.base_layer
    layer.merge()
    assert type(layer.base_layer) is getattr(base, "dense_class", type(base))
    assert error(model(x), want["y"]) < tolerance
    layer.unmerge()
    assert layer.base_layer is base
    assert error(model(x), want["y"]) < tolerance


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("name", LINEARS)
def test_linear_layers(name, adapters):
    module, x = built(name)
    check(*adapted(module, (0.0,) * adapters), x)


@pytest.mark.parametrize("quantization", [None, "nf4", "fp4"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name, geometry, quantization):
    module, x = built(name, **geometry)
    if "Scaled" in name:
        nn.init.normal_(module.gain, 1.0, 0.2)
    check(*adapted(module, (0.0, 0.0), ranks=(3, 2), quantization=quantization), x)


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("name", [*LINEARS, *CONVS])
def test_detaching_gives_the_module_back(name, quantization):
    module, x = built(name)
    model = nn.Sequential(module)
    if quantization and name in LINEARS:
        pytest.skip("linear layers with a forward of their own stay dense")
    if quantization:
        la.attach(model, rank=2, targets=["0"], quantization=quantization).detach()
    before, base, y = state(model), model[0], model(x)
    adapter = la.attach(model, rank=2, targets=["0"])
    perturb(model)
    assert error(model(x), y) > 1e-3
    adapter.detach()
    assert model[0] is base
    assert_same(model, before)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_same_padding_takes_the_fused_way(quantization):
    """Its convolution is plain: neither W + BA nor a gradient of its size is made."""
    module, x = built("same", stride=2)
    model, layer = adapted(module, quantization=quantization)
    want = naive(model, layer, x)
    with mock.patch.object(effective, "effective_weight", side_effect=AssertionError("the values were made")):
        assert_like(outcome(model, x), want)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x.clone().requires_grad_())
    sizes = [t.numel() for t in kept if t.data_ptr() != getattr(layer.base_layer.weight, "data_ptr", int)()]
    assert 16 * 8 * 9 not in sizes


@pytest.mark.parametrize("name", [*LINEARS, *CONVS])
def test_the_probe_knows_which_classes_multiply_their_input(name):
    module, _ = built(name)
    before = state(module)
    assert multiplies_its_input(module) == (name in FOLLOWED)
    assert_same(module, before)


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("name", CONVS)
def test_dropout_is_done_or_refused(name, quantization):
    module, x = built(name)
    model = nn.Sequential(module)
    before = state(model)
    if name not in FOLLOWED:
        with pytest.raises(UnsupportedError, match=r"dropout=0\.0"):
            la.attach(model, rank=2, targets=["0"], dropout=0.3, quantization=quantization)
        assert_same(model, before)
        return
    model, layer = adapted(module, (0.4,), quantization=quantization)
    layer.train()
    torch.manual_seed(3)
    first, second = model(x), model(x)
    assert error(first, second) > 1e-3
    mean = sum(model(x) for _ in range(600)) / 600
    model.eval()
    assert error(mean, model(x)) < 0.1


def test_dropout_leaves_layers_out_that_a_role_chose():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), timm_layers.StdConv2d(8, 8, 3))
    plan = la.plan(model, rank=2, targets="conv", dropout=0.1)
    assert [layer.name for layer in plan.layers] == ["0"]
    assert "computes with its weight before it multiplies" in plan.skipped[0].reason


@pytest.mark.parametrize("name", ["doubled", "same", "ScaledStdConv2d"])
def test_compiled_and_exported(name):
    module, x = built(name)
    model, _ = adapted(module)
    want = outcome(model, x)
    torch._dynamo.reset()
    compiled = nn.Sequential(torch.compile(model, backend="aot_eager", fullgraph=True))
    got = {name.removeprefix("0._orig_mod."): value for name, value in outcome(compiled, x).items()}
    assert_like(got, want)
    exported = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), want["y"])


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_copies_and_threads(quantization):
    module, x = built("ScaledStdConv2dSame", stride=2)
    model, layer = adapted(module, quantization=quantization)
    want = outcome(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_like(outcome(twin, x), want, 0)
    y = model(x)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(each, y) for each in pool.map(lambda _: model(x), range(64)))
    assert type(layer.base_layer._parameters["weight"]) is nn.Parameter


def test_an_error_inside_the_forward_leaves_the_weight():
    model, layer = adapted(built("same")[0])
    with pytest.raises(RuntimeError):
        model(data(2, 5, 9, 9))
    assert type(layer.base_layer._parameters["weight"]) is nn.Parameter


def test_hooks_of_the_base_run():
    module, x = built("StdConv2d")
    model, layer = adapted(module)
    seen = []
    y = model(x)
    layer.base_layer.register_forward_hook(lambda m, args, out: seen.append(m) or 2 * out)
    torch.testing.assert_close(model(x), 2 * y)
    assert seen == [layer.base_layer]


def test_rows_with_adapters_of_their_own_are_refused():
    _, layer = adapted(built("StdConv2d")[0])
    with pytest.raises(UnsupportedError, match="adapter_names"):
        layer(data(2, 8, 9, 9), adapter_names=["default", "__base__"])


def test_peft_s_variants_are_refused():
    for options in ({"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(UnsupportedError, match="forward of its own"):
            la.attach(nn.Sequential(built("StdConv2d")[0]), rank=2, targets=["0"], **options)


def test_disabled_adapters_and_switching():
    module, x = built("StdConv2dSame", stride=2)
    plain = module(x)
    model, layer = adapted(module, (0.0, 0.0))
    both = model(x)
    layer.set_adapter(["second"])
    second = model(x)
    assert min(error(second, both), error(both, plain), error(second, plain)) > 1e-3
    layer.enable_adapters(False)
    assert torch.equal(model(x), plain)


def test_16_bits():
    for quantization in (None, "nf4"):
        for name in ("same", "ScaledStdConv2dSame"):
            module, x = built(name, stride=2)
            model, layer = adapted(module.bfloat16(), quantization=quantization)
            y = model(x.bfloat16())
            assert y.dtype is torch.bfloat16
            y.sum().backward()
            layer.merge()
            merged = model(x.bfloat16())
            assert merged.dtype is torch.bfloat16
            assert error(merged, y) < 2e-2


@pytest.mark.parametrize("plain", [nn.Conv2d(8, 16, 3), nn.Linear(24, 40)], ids=str)
def test_a_merged_4_bit_base_in_16_bits_has_a_bias_of_its_dtype(plain):
    model, layer = adapted(plain.bfloat16(), quantization="nf4")
    x = (data(2, 8, 9, 9) if isinstance(plain, nn.Conv2d) else data(3, 24)).bfloat16()
    y = model(x)
    layer.merge()
    assert {p.dtype for p in layer.base_layer.parameters()} == {torch.bfloat16}
    assert error(model(x), y) < 2e-2


# ---- attributes ------------------------------------------------------------------------------------------------------


def test_a_layer_has_the_attributes_of_its_base():
    module, _ = built("ScaledStdConv2dSame", stride=2, groups=4)
    module.custom = "mine"
    _, layer = adapted(module, quantization="nf4")
    assert (layer.kernel_size, layer.stride, layer.groups, layer.in_channels) == ((3, 3), (2, 2), 4, 8)
    assert (layer.custom, layer.eps, layer.same_pad) == ("mine", 1e-6, True)
    assert layer.gain is layer.base_layer.gain
    for name in ("nothing", "lora_nothing", "__nothing__", "base_layer_"):
        assert not hasattr(layer, name)
    with pytest.raises(AttributeError, match="nothing"):
        layer.nothing  # noqa: B018
    empty = type(layer).__new__(type(layer))
    assert not hasattr(empty, "base_layer")
    assert not hasattr(empty, "anything")
