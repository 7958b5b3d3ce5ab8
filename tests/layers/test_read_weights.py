"""Layers whose weight is read without a call: reading gives the effective weight, with its gradients, over any store."""

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, perturb, state
from layer_checks import assert_like, error
from reading import Reader, with_reads
from torch import nn

import lora_adapters as la
from lora_adapters.errors import LoraAdaptersWarning, UnsupportedError
from lora_adapters.generic import GenericBackend
from lora_adapters.layers import effective
from lora_adapters.weights import store_for

STORES = [None, "nf4", "fp4", "int8"]


@pytest.fixture(autouse=True)
def _reads(monkeypatch):
    with_reads(monkeypatch, GenericBackend)


def data(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reader(quantization=None, adapters=1, dtype=torch.float32, targets=("qkv", "conv", "called"), **options):
    """Return a model and its first adapter; all adapters are active and matter."""
    torch.manual_seed(0)
    model = Reader(dtype)
    first = None
    for i in range(adapters):
        if quantization == "int8":
            targets = [name for name in targets if name != "conv"]
        settings = {"rank": 3 + i, "alpha": 5.1 * (i + 1), "adapter_name": f"a{i}", **options}
        adapter = la.attach(model, targets=list(targets), quantization=None if i else quantization, **settings)
        first = first or adapter
    for layer in first.layers.values():
        layer.set_adapter([f"a{i}" for i in range(adapters)])
    perturb(model)
    return model, first


def naive(layer, names):
    """W + sum s B A, dense, from leaves of its own; and those leaves by name."""
    store = store_for(layer.base_layer)
    weight, leaves = store.read(), {}
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    for name in names:
        a, b = (p.detach().clone().requires_grad_() for p in layer.factor_parameters(name))
        leaves |= {f"{name}.A": a, f"{name}.B": b}
        total = total + (layer.scaling[name] * b.to(wide).flatten(1) @ a.to(wide).flatten(1)).view(total.shape)
    return total.to(weight.dtype), leaves


def factor_gradients(layer, names):
    pairs = [(name, layer.factor_parameters(name)) for name in names]
    return {f"{n}.{w}": p.grad for n, pair in pairs for w, p in zip("AB", pair, strict=True)}


def compare(layer, names, use, x, tolerance, extra=()):
    """Compare a use of the layer's weight with the same use of the naive one: the result and all gradients."""
    dense, leaves = naive(layer, names)
    found = []
    for weight in (layer.weight, dense):
        inputs = [t.detach().clone().requires_grad_() for t in (x, *extra)]
        y = use(weight, *inputs)
        y.backward(data(*y.shape, dtype=y.dtype, seed=7))
        found.append({"y": y.detach(), **{str(i): t.grad for i, t in enumerate(inputs)}})
    got, want = found
    assert_like(
        {**got, **factor_gradients(layer, names)}, {**want, **{n: p.grad for n, p in leaves.items()}}, tolerance
    )
    layer.zero_grad()


LINEAR_USES = {
    "F.linear": (lambda w, x, b: F.linear(x, w, b), True),
    "keywords": (lambda w, x, b: F.linear(x, weight=w, bias=b), True),
    "no bias": (lambda w, x, b: F.linear(x, w) + b, True),
    "matmul": (lambda w, x, b: x @ w.t() + b, False),
    "einsum": (lambda w, x, b: torch.einsum("btc,oc->bto", x, w) + b, False),
    "rows": (lambda w, x, b: F.linear(x, w[:40:2], b[:20]), False),
    "cast": (lambda w, x, b: F.linear(x.double(), w.to(torch.float64), b.double()), False),
    "chunks": (lambda w, x, b: F.linear(x, torch.cat(w.chunk(2)[::-1]), b), False),
    "its norm": (lambda w, x, b: x.sum() * w.pow(2).sum(0) + b.sum(), False),
}


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("quantization", STORES)
@pytest.mark.parametrize("use", LINEAR_USES)
def test_every_use_of_a_linear_weight(use, quantization, adapters):
    model, _ = reader(quantization, adapters)
    function, fast = LINEAR_USES[use]
    names = [f"a{i}" for i in range(adapters)]
    with mock.patch.object(effective, "effective_weight", side_effect=AssertionError("the values were made")) as made:
        if not fast:
            made.side_effect = effective_weight
        compare(model.qkv, names, function, data(3, 7, 24), 1e-5, [data(40, seed=2)])


effective_weight = effective.effective_weight

CONV_USES = {
    "padded": lambda w, x: F.conv2d(x, w, None, (1, 2), (2, 1), 1, 2),
    "dilated": lambda w, x: F.conv2d(x, w, stride=2, padding=2, dilation=(2, 1), groups=2),
    "same": lambda w, x: F.conv2d(x, w, padding="same", groups=2),
    "transposed": lambda w, x: F.conv_transpose2d(F.conv2d(x, w, groups=2), w, groups=2),
    "standardised": lambda w, x: F.conv2d(x, (w - w.mean((1, 2, 3), True)) / w.std((1, 2, 3), keepdim=True), groups=2),
}


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("use", CONV_USES)
def test_every_use_of_a_convolution_weight(use, quantization):
    model, _ = reader(quantization, 2)
    compare(model.conv, ["a0", "a1"], CONV_USES[use], data(2, 6, 11, 9), 1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]
)
def test_dtypes(dtype, tolerance):
    model, _ = reader(dtype=dtype)
    use = LINEAR_USES["F.linear"][0]
    compare(model.qkv, ["a0"], use, data(3, 7, 24, dtype=dtype), tolerance, [data(40, dtype=dtype)])
    compare(model.conv, ["a0"], CONV_USES["padded"], data(2, 6, 11, 9, dtype=dtype), tolerance)


@pytest.mark.parametrize("quantization", STORES)
def test_autocast(quantization):
    model, _ = reader(quantization)
    x = data(3, 7, 24)
    want = F.linear(x, naive(model.qkv, ["a0"])[0], model.bias)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, model.qkv.weight, model.bias)
    assert error(y, want) < 2e-2


def test_a_function_that_torch_does_not_see_through_gets_its_gradient_too():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.t()

        @staticmethod
        def backward(ctx, dy):
            x, weight = ctx.saved_tensors
            return dy @ weight, dy.flatten(0, 1).t() @ x.flatten(0, 1)

    model, _ = reader()
    compare(model.qkv, ["a0"], lambda w, x: Own.apply(x, w), data(3, 7, 24), 1e-5)


def test_nothing_of_the_weights_size_is_kept_for_backward():
    model, _ = reader("nf4")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.linear(data(2, 24).requires_grad_(), model.qkv.weight, model.bias)
    assert kept
    assert all(t.numel() < 24 * 40 for t in kept)


def test_it_looks_like_the_weight_it_stands_for():
    model, _ = reader("nf4")
    weight = model.qkv.weight
    assert isinstance(weight, torch.Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device.type, weight.ndim) == ((40, 24), torch.float32, "cpu", 2)
    assert weight.requires_grad
    assert not weight.is_leaf
    assert weight.size(1) == 24
    assert weight.numel() == 960
    assert len(weight) == 40
    dense = naive(model.qkv, ["a0"])[0]
    for plain in (weight.detach(), weight.data, weight.clone(), weight.contiguous(), weight.to("cpu", copy=True)):
        torch.testing.assert_close(plain, dense)
    assert not weight.detach().requires_grad
    assert "shape=(40, 24)" in repr(weight)
    with torch.no_grad():
        assert not model.qkv.weight.requires_grad
        torch.testing.assert_close(copy.deepcopy(model.qkv.weight.detach()), dense.detach())
    assert all(type(p) is not type(weight) for p in model.parameters())
    assert "qkv.weight" not in dict(model.named_parameters())


def test_it_follows_the_state_of_the_layer():
    model, adapter = reader("nf4", 2)
    layer = model.qkv
    plain, both = store_for(layer.base_layer).read(), naive(layer, ["a0", "a1"])[0]
    torch.testing.assert_close(layer.weight.detach(), both)
    layer.set_adapter(["a1"])
    torch.testing.assert_close(layer.weight.detach(), naive(layer, ["a1"])[0])
    layer.set_adapter(["a0", "a1"])
    with adapter.disabled():
        assert torch.equal(layer.weight, plain)
    layer.merge(adapter_names=["a0", "a1"])
    assert layer.weight is layer.base_layer.weight
    torch.testing.assert_close(layer.weight, both)
    layer.unmerge()
    layer.scaling["a0"] = -0.5
    torch.testing.assert_close(layer.weight.detach(), naive(layer, ["a0", "a1"])[0])
    layer.scaling["a0"] = torch.tensor(0.25, requires_grad=True)
    layer.weight.sum().backward()
    assert layer.scaling["a0"].grad.abs() > 0
    layer._active_adapter = []
    assert torch.equal(layer.weight, plain)


def test_a_base_that_trains_gets_its_gradient():
    model, _ = reader()
    model.qkv.base_layer.weight.requires_grad_()
    x = data(3, 7, 24)
    F.linear(x, model.qkv.weight).sum().backward()
    torch.testing.assert_close(model.qkv.base_layer.weight.grad, x.sum((0, 1)).expand(40, 24))
    assert model.qkv.lora_A["a0"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("quantization", STORES)
def test_calling_the_module_works_as_well(quantization):
    model, _ = reader(quantization)
    x = data(70, 24)
    want = F.linear(x, naive(model.qkv, ["a0"])[0])
    for train in (True, False):
        model.train(train)
        assert error(model.qkv(x), want) < (2e-2 if quantization == "int8" else 1e-5)


def test_dropout_is_that_of_a_call_where_the_input_is_known():
    model, _ = reader(dropout=0.5)
    x = data(3, 7, 24)
    found = []
    for use in (model.qkv, lambda x: F.linear(x, model.qkv.weight)):
        torch.manual_seed(4)
        found.append(outcome(model, use, x))
    assert_like(found[1], found[0])
    assert error(found[0]["y"], F.linear(x, naive(model.qkv, ["a0"])[0])) > 0.1
    with pytest.raises(UnsupportedError, match=r"dropout=0\.0"):
        x @ model.qkv.weight.t()
    model.eval()
    torch.testing.assert_close(x @ model.qkv.weight.t(), model.qkv(x))


def outcome(model, run, x):
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return {"y": y.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_whole_model_every_way(quantization, tmp_path):
    """Merged, compiled, exported, recomputed, copied, without fused forwards, saved and restored: one result."""
    model, adapter = reader(quantization)
    x = data(2, 7, 24)
    want = outcome(model, model, x)
    assert {n for n in want if "lora" in n} == {n for n, _ in model.named_parameters() if "lora" in n}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    recomputed = lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)  # noqa: E731
    for run in (compiled, recomputed):
        assert_like(outcome(model, run, x), want, 1e-5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_like(outcome(twin, twin, x), want, 1e-6)
    if quantization is None:  # the 4-bit layer that is called can do neither
        one_by_one = torch.stack([model(each[None]) for each in x])
        torch.testing.assert_close(torch.vmap(model)(x.unsqueeze(1)), one_by_one)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), want["y"])
    for layer in adapter.layers.values():
        layer.fused = False
    assert_like(outcome(model, model, x), want, 1e-5)
    adapter.merge()
    torch.testing.assert_close(model(x), want["y"], rtol=1e-5, atol=1e-5)
    adapter.unmerge()
    with pytest.warns(LoraAdaptersWarning, match="Stock PEFT"):
        adapter.save(tmp_path)
    other, second = reader(quantization)  # in 4 bits its base is that of `model` only while an adapter unpacks it
    other.qkv.lora_A["a0"].weight.data.zero_()
    la.restore(other, tmp_path, adapter_name="back")
    for layer in second.layers.values():
        layer.set_adapter(["back"])
    torch.testing.assert_close(other(x), want["y"], rtol=1e-5, atol=1e-5)


def test_exported_and_without_gradients():
    model, _ = reader()
    x = data(2, 7, 24)
    want = model.eval()(x).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want)


def test_torch_fx_would_record_a_constant():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(24, 40)

        def forward(self, x):
            return F.linear(x, self.qkv.weight, self.qkv.bias)

    model, x = Plain(), data(3, 24)
    adapter = la.attach(model, rank=2, targets=["qkv"])
    with pytest.raises(UnsupportedError, match=r"torch\.fx"):
        torch.fx.symbolic_trace(model)
    perturb(model)
    y = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(adapter.merge(unload=True))(x), y)


def test_keys_are_those_of_peft():
    from peft import LoraConfig, get_peft_model

    mine, _ = reader()
    stock = get_peft_model(Reader(), LoraConfig(r=3, target_modules=["qkv", "called"]), adapter_name="a0")
    names = {key for key in mine.state_dict() if key.startswith(("qkv", "called"))}
    assert names == {key for key in stock.get_base_model().state_dict() if key.startswith(("qkv", "called"))}
    layers = dict(stock.get_base_model().named_modules())
    assert type(mine.qkv).__name__ == type(layers["qkv"]).__name__
    assert isinstance(mine.qkv, type(layers["qkv"]))


def test_detaching_gives_the_bits_back():
    torch.manual_seed(0)
    model = Reader()
    before = state(model)
    adapter = la.attach(model, rank=2, targets=["qkv", "conv"])
    model(data(2, 7, 24)).sum().backward()
    adapter.detach()
    assert type(model.qkv) is nn.Linear
    assert_same(model, before)


def test_nothing_packed_is_left_where_it_is_read():
    x = data(2, 7, 24)
    model, adapter = reader("nf4")
    with adapter.disabled():
        want = model(x)
    with pytest.warns(LoraAdaptersWarning, match="2 quantized modules became dense"):
        adapter.detach()
    assert type(model.qkv) is nn.Linear
    assert type(model.conv) is nn.Conv2d
    assert type(model.called).__name__ == "Linear4bit"
    torch.testing.assert_close(model(x), want)


def test_a_second_adapter_keeps_the_first_ones_base_packed():
    model, first = reader("nf4")
    second = la.attach(model, rank=2, targets=["qkv"], adapter_name="b")
    first.detach()  # conv is left by its only adapter, qkv is not
    assert type(model.qkv.base_layer).__name__ == "Linear4bit"
    assert type(model.conv) is nn.Conv2d
    model(data(2, 7, 24))
    with pytest.warns(LoraAdaptersWarning, match="2 quantized modules became dense"):
        second.detach()
    model(data(2, 7, 24))


def test_a_read_module_without_an_adapter_stays_dense():
    model = Reader()
    plan = la.plan(model, rank=2, targets=["called"], quantization="nf4")
    assert set(plan.quantize) == {"called"}
    (note,) = [note for note in plan.notes if "stay dense" in note]
    assert "2 modules stay dense (first 'qkv'): Reader.forward reads the weight" in note
    la.attach(model, rank=2, targets=["called"], quantization="nf4")
    model(data(2, 7, 24))


def test_the_plan_says_who_reads():
    plan = la.plan(Reader(), rank=2, targets=["qkv", "called"])
    assert [layer.read_by for layer in plan.layers] == ["Reader.forward", ""]
    assert plan.layers[0].layer == "lora_adapters.layers.effective:Linear"
    assert plan.layers[1].layer == "lora_adapters.layers.linear:Linear"
    assert any("Reader.forward reads the weight of 'qkv'" in note for note in plan.notes)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.mid = nn.Embedding(20, 16), nn.Linear(16, 16)

    def forward(self, ids):
        return F.linear(self.mid(self.emb(ids)), self.emb.weight)


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (Tied, {"targets": ["emb"]}, "no adapter layer for Embedding"),
        (Reader, {"targets": ["qkv"], "lora_bias": True}, "lora_bias=True"),
        (Reader, {"targets": ["qkv"], "use_dora": True}, "use_dora"),
        (Reader, {"targets": ["qkv"], "init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_what_reading_code_would_not_notice_is_refused(model, options, reason):
    model = model()
    before = state(model)
    with pytest.raises(UnsupportedError, match=reason):
        la.attach(model, rank=2, **options)
    assert_same(model, before)


def test_a_layer_of_stock_peft_around_it_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Reader(), LoraConfig(r=3, target_modules=["qkv"]))
    with pytest.raises(UnsupportedError, match="detach that adapter first"):
        la.attach(model, rank=2, targets=["qkv"], adapter_name="mine")
