"""4-bit convolutions that run the forward of the class they were made from."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn

from lora_adapters.weights import Bnb4bit, Nf4, store_for
from lora_adapters.weights.conv4bit_own import OwnForwardConv1d4bit, OwnForwardConv2d4bit


class Scaled(nn.Conv2d):
    """Standardises its weight; has a parameter, a buffer, a child and settings of its own."""

    def __init__(self, *args, eps=1e-3, **options):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.linspace(0.5, 2, self.out_channels).view(-1, 1, 1, 1))
        self.register_buffer("shift", torch.full((1,), 0.25))
        self.register_buffer("hidden", torch.ones(1), persistent=False)
        self.act, self.eps = nn.Tanh(), eps

    def forward(self, input):
        weight = (self.weight - self.weight.mean((1, 2, 3), True)) / (
            self.weight.var((1, 2, 3), keepdim=True) + self.eps
        )
        return self._conv_forward(self.act(input) + self.shift * self.hidden, self.gain * weight, self.bias)


class Lefted(nn.Conv1d):
    def forward(self, input):
        return super().forward(F.pad(input, (2, 0)))


def pair(kind=Scaled, quantizer=None, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    dense = kind(6, 12, 3, **settings).to(dtype)
    return dense, (quantizer or Nf4()).quantize(dense, dtype)


def data(kind=Scaled, dtype=torch.float32):
    shape = (2, 6, 17) if kind is Lefted else (2, 6, 17, 14)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def outcome(module, x):
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    own = {n: p.grad for n, p in module.named_parameters() if n != "weight"}
    return {"y": y.detach(), "x": x.grad, **own}


@pytest.mark.parametrize(
    "settings", [{}, {"groups": 3, "stride": 2, "bias": False}, {"dilation": 2, "padding": 1}], ids=str
)
@pytest.mark.parametrize("quantizer", [Nf4(), Bnb4bit("fp4", 32, False)], ids=str)
@pytest.mark.parametrize("kind", [Scaled, Lefted])
def test_equals_the_class_on_the_dequantized_weight(kind, quantizer, settings):
    _, module = pair(kind, quantizer, **settings)
    assert type(module) is (OwnForwardConv1d4bit if kind is Lefted else OwnForwardConv2d4bit)
    store = store_for(module)
    dense = store.dense_module(store.read())
    assert type(dense) is kind
    assert store.nbytes == quantizer.nbytes(store.shape)
    got, want = outcome(module, data(kind)), outcome(dense, data(kind))
    assert got.keys() == want.keys()
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    assert module.weight.grad is None


def test_the_dense_module_has_everything_the_class_had():
    dense, module = pair(eps=0.125, padding_mode="reflect", padding=1)
    dense.train(False)
    again = store_for(module).dense_module(dense.weight)
    assert {n: v for n, v in vars(again).items() if not n.startswith("_") and n != "training"} == {
        n: v for n, v in vars(dense).items() if not n.startswith("_") and n != "training"
    }
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in dense.named_parameters()]
    for name, tensor in dense.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert again.gain is not module.gain
    assert again._buffers.keys() == dense._buffers.keys()
    torch.testing.assert_close(again(data()), dense(data()))
    again.new_attribute = 1
    assert not hasattr(module, "new_attribute")


def test_the_old_module_stays_as_it_was():
    dense, module = pair()
    assert module.gain is not dense.gain
    module.to(torch.bfloat16)
    assert {p.dtype for p in dense.parameters()} == {torch.float32}
    assert module.training == dense.training


def test_copies_files_and_state_dicts():
    _, module = pair()
    want = outcome(module, data())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    fresh = pair()[1]
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.zero_()
    fresh.load_state_dict(load(save(module.state_dict())), strict=False)
    fresh.get_buffer("quant_map").copy_(module.get_buffer("quant_map"))
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    for twin in (*twins, pair()[1]):
        assert type(twin) is type(module)
        assert twin.dense_class is Scaled
        assert twin.state_dict().keys() == module.state_dict().keys()
        got = outcome(twin, data())
        assert all(torch.equal(got[name], expected) for name, expected in want.items())
    assert {"weight", "bias", "gain", "shift", "absmax", "quant_map"} <= module.state_dict().keys()
    assert "hidden" not in module.state_dict()
    twins[0].gain.data.zero_()
    assert module.gain.abs().sum() > 0


def test_a_state_dict_loads():
    _, module = pair()
    other = Nf4().quantize(Scaled(6, 12, 3), torch.float32)
    assert not torch.equal(other(data()), module(data()))
    other.load_state_dict(load(save(module.state_dict())))
    assert torch.equal(other(data()), module(data()))


def test_casting_changes_what_it_computes_in():
    _, module = pair()
    want = module(data())
    module.to(torch.bfloat16)
    assert (module.compute_dtype, module.gain.dtype, module.weight.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.uint8,
    )
    y = module(data(dtype=torch.bfloat16))
    assert y.dtype is torch.bfloat16
    assert (y - want).norm() < 3e-2 * want.norm()
    assert module.to(torch.float32)(data()).dtype is torch.float32


def test_a_compute_dtype_other_than_the_parameters():
    dense, _ = pair()
    module = Nf4().quantize(dense, torch.bfloat16)
    got = outcome(module, data())
    assert got["y"].dtype is torch.float32
    assert got["gain"].dtype is torch.float32
    assert (got["y"] - dense(data())).norm() < 0.2 * got["y"].norm()


def test_on_meta_and_in_words():
    with torch.device("meta"):
        dense = Scaled(6, 12, 3)
    module = Nf4().quantize(dense, torch.float32)
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
    assert module(torch.empty(2, 6, 9, 9, device="meta")).shape == (2, 12, 7, 7)
    assert "quant_type=nf4, dense_class=Scaled" in repr(module)


def test_a_plain_convolution_in_the_forward_keeps_no_dense_weight():
    _, module = pair(Lefted)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(data(Lefted))
    assert not any(t.is_floating_point() and t.shape == module.dense_shape for t in kept)


def test_compiled():
    _, module = pair()
    want = outcome(module, data())
    torch._dynamo.reset()
    y = torch.compile(module, backend="aot_eager")(data())
    torch.testing.assert_close(y, want["y"])


def test_linear_layers_with_a_forward_of_their_own_stay_dense():
    class Own(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    assert "forward of its own" in Nf4().supports(Own(64, 64))
    assert Nf4().supports(Scaled(6, 12, 3)) == ""
