"""The dense store: logical shapes, in-place writes, copies that stay exactly what they were."""

import pytest
import torch
from torch import nn

from lora_adapters.errors import RequestError
from lora_adapters.weights import WeightStore, dense_store, store_for, why_not_plain


class MyLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Conv1D(nn.Module):
    """Looks like transformers' class of this name: the weight has shape (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


LAYERS = [
    (nn.Linear(5, 7), (7, 5)),
    (MyLinear(5, 7, bias=False), (7, 5)),
    (nn.Conv1d(4, 6, 3, groups=2), (6, 2, 3)),
    (nn.Conv2d(4, 6, (3, 1), stride=2), (6, 4, 3, 1)),
    (nn.Embedding(11, 3), (11, 3)),
    (Conv1D(7, 5), (7, 5)),
]


@pytest.mark.parametrize("module, shape", LAYERS)
def test_store_reads_writes_and_copies(module, shape):
    store = store_for(module)
    assert isinstance(store, WeightStore)
    assert store.format == "dense"
    assert store.shape == shape
    assert store.nbytes == module.weight.nbytes
    parameter = module.weight
    before = parameter.detach().clone()
    read = store.read(torch.bfloat16)
    assert read.dtype == torch.bfloat16
    assert read.shape == shape
    store.read().zero_()
    assert torch.equal(parameter, before), "read must not hand out what is stored"
    new = torch.randn(shape)
    copy = store.dense_module(new)
    assert type(copy) is type(module)
    assert torch.equal(parameter, before)
    assert copy.weight.shape == parameter.shape
    assert not copy.weight.requires_grad
    x = torch.randint(11, (2, 4)) if isinstance(module, nn.Embedding) else torch.randn(2, before.shape[1], 8, 8)
    x = x if isinstance(module, nn.Embedding) else {2: x[:, 0, 0, :5], 3: torch.randn(2, 4, 8), 4: x}[before.dim()]
    expected = copy(x)
    store.write(new)
    assert module.weight is parameter
    assert torch.equal(store.read(), new)
    assert torch.equal(module(x), expected)
    store.write(before.t() if isinstance(module, Conv1D) else before)
    assert torch.equal(parameter, before)


def test_copy_keeps_hooks_in_dicts_of_its_own():
    module = nn.Linear(2, 2)
    calls = []
    module.register_forward_hook(lambda *_: calls.append("old"))
    copy = dense_store(module).dense_module(torch.zeros(2, 2))
    copy.register_forward_hook(lambda *_: calls.append("new"))
    copy(torch.ones(1, 2))
    assert calls == ["old", "new"]
    module(torch.ones(1, 2))
    assert calls == ["old", "new", "old"]


def test_wrong_shape_changes_nothing():
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    for call in (store_for(module).write, store_for(module).dense_module):
        with pytest.raises(RequestError, match=r"\(2, 3\)"):
            call(torch.zeros(3, 2))
    assert torch.equal(module.weight, before)


def test_works_on_meta():
    store = store_for(nn.Linear(3, 2, device="meta"))
    assert store.nbytes == 24
    assert store.read().device.type == "meta"


def test_weights_that_are_not_plain_have_no_store():
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    float8 = nn.Linear(3, 3)
    float8.weight = nn.Parameter(float8.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    for module in (weight_norm, float8, nn.LazyLinear(3), nn.LayerNorm(3), nn.ConvTranspose1d(2, 2, 1)):
        assert store_for(module) is None
        assert why_not_plain(module, ("linear", "conv1d"))


def test_layers_with_a_forward_of_their_own_must_not_be_replaced():
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x
    attention = nn.MultiheadAttention(4, 2).out_proj
    for module, reason in ((MyLinear(2, 2), "of its own"), (replaced, "replaced"), (attention, "without calling")):
        assert reason in why_not_plain(module, ("linear",))
    assert why_not_plain(nn.Linear(2, 2), ("linear",)) == ""
    assert "kinds" in why_not_plain(nn.Conv2d(1, 1, 1), ("linear",))


def test_layers_that_do_more_than_their_forward_must_not_be_replaced():
    class Called(nn.Conv2d):
        def __call__(self, *args):
            return 2 * super().__call__(*args)

    class Computed(nn.Conv2d):
        weight = property(lambda self: 2 * self._parameters["weight"])

        def __init__(self):
            super().__init__(2, 2, 1, bias=False)

        def __setattr__(self, name, value):
            if name == "weight":
                self._parameters[name] = value
            else:
                super().__setattr__(name, value)

    for own_forward in (False, True):
        assert "when it is called" in why_not_plain(Called(2, 2, 1), ("conv2d",), own_forward)
        assert "computes its weight" in why_not_plain(Computed(), ("conv2d",), own_forward)
