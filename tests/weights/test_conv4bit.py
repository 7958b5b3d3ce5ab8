"""4-bit convolutions: the framework's own convolution on the dequantized weight, in a module that behaves."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load, save
from torch import nn

from lora_adapters.errors import RequestError, UnsupportedError
from lora_adapters.weights import Bnb4bit, Conv1d4bit, Conv2d4bit, Nf4, store_for

SETTINGS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": 1, "groups": 2},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 4, "padding": "same", "dilation": 3, "padding_mode": "circular"},
    {"kernel_size": 5, "padding": "valid", "dilation": 2},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "groups": 6},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": "same"},
]


def pair(kind=nn.Conv2d, quantizer=None, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    dense = kind(6, 12, **{"kernel_size": 3, **settings}, dtype=dtype)
    return dense, (quantizer or Nf4()).quantize(dense, dtype)


def bytes_of(module):
    tensors = {"weight": module.weight, **module.statistics}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def same(one, other):
    return one.keys() == other.keys() and all(one[k].dtype == other[k].dtype and one[k].equal(other[k]) for k in one)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_equals_the_dense_convolution_forward_and_backward(kind, settings):
    dense, module = pair(kind, **settings)
    assert isinstance(module, kind)
    store = store_for(module)
    reference = store.dense_module(store.read())
    assert type(reference) is kind
    size = (17,) if kind is nn.Conv1d else (17, 14)
    for shape in ((2, 6, *size), (6, *size)):
        x, x2 = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
        y, y2 = module(x), reference(x2)
        assert y.shape == dense(x).shape
        assert torch.allclose(y, y2, atol=1e-5)
        grad = torch.randn_like(y)
        y.backward(grad)
        y2.backward(grad)
        assert torch.allclose(x.grad, x2.grad, atol=1e-5)
        if module.bias is not None:
            assert torch.allclose(module.bias.grad, reference.bias.grad, atol=1e-4)
            module.bias.grad = reference.bias.grad = None
    assert module.weight.grad is None


def test_gradient_by_finite_differences():
    _, module = pair(padding=1, stride=2, groups=2)
    module.compute_dtype = torch.float64
    module.bias.data = module.bias.data.double()
    x = torch.randn(1, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "quantizer", [Nf4(), Bnb4bit("fp4", 32, False), Bnb4bit("nf4", 4096, True), Bnb4bit("fp4", 64, True)], ids=str
)
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (8, 4, 1, 1), (1, 1, 1), (3, 3, 7), (16, 16, 3, 3)])
def test_packs_the_flattened_weight_as_bitsandbytes_does(shape, quantizer, dtype):
    kind = nn.Conv1d if len(shape) == 3 else nn.Conv2d
    dense = kind(shape[1], shape[0], shape[2:], dtype=dtype)
    module = quantizer.quantize(dense, dtype)
    packed, state = quantize_4bit(
        dense.weight.detach(),
        blocksize=quantizer.blocksize,
        quant_type=quantizer.quant_type,
        compress_statistics=quantizer.nested,
    )
    assert torch.equal(module.weight, packed)
    if packed.shape[0] == 1:  # bitsandbytes takes this for a transposed weight, and can't transpose three dimensions
        state.shape = torch.Size((1, 1))
    with torch.compiler.set_stance("force_eager"):  # it compiles a kernel for every odd shape
        expected = dequantize_4bit(packed, state).reshape(shape)
    store = store_for(module)
    assert torch.equal(store.read(), expected)
    assert (store.format, store.shape, store.dtype) == (quantizer.name, shape, dtype)
    assert store.nbytes == quantizer.nbytes(torch.Size(shape))
    assert store.nbytes == sum(t.nbytes for t in bytes_of(module).values())


def test_the_dense_weight_does_not_live_until_backward(monkeypatch):
    _, module = pair(padding=1)
    weights = []
    plain = Conv2d4bit.dequantize

    def watched(self, dtype):
        weight = plain(self, dtype)
        weights.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(Conv2d4bit, "dequantize", watched)
    y = module(torch.randn(1, 6, 5, 5, requires_grad=True))
    gc.collect()
    assert len(weights) == 1
    assert weights[0]() is None
    saved = y.grad_fn.saved_tensors if hasattr(y.grad_fn, "saved_tensors") else ()
    assert not any(t.is_floating_point() and t.numel() >= 6 * 12 * 9 for t in saved if t.dim() > 1)
    y.sum().backward()


def test_writing_between_forward_and_backward_is_noticed():
    _, module = pair()
    y = module(torch.randn(1, 6, 5, 5, requires_grad=True))
    store_for(module).write(torch.ones(12, 6, 3, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("start", ["cpu", "meta"])
@pytest.mark.parametrize("quantizer", [Nf4(), Bnb4bit("fp4", 128, False)], ids=str)
def test_state_dict_through_safetensors_into_a_fresh_module(quantizer, start, assign):
    _, module = pair(quantizer=quantizer, padding=1)
    settings = {"quant_type": quantizer.quant_type, "blocksize": quantizer.blocksize, "nested": quantizer.nested}
    fresh = Conv2d4bit(6, 12, 3, padding=1, device=start, **settings)
    assert bytes_of(module).keys() == bytes_of(fresh if start == "cpu" else module).keys()
    state = load(save(module.state_dict()))
    if start == "meta" and not assign:
        fresh.to_empty(device="cpu")
    fresh.load_state_dict(state, strict=True, assign=assign)
    assert same(bytes_of(fresh), bytes_of(module))
    x = torch.randn(1, 6, 5, 5)
    assert torch.equal(fresh(x), module(x))
    assert not fresh.weight.requires_grad


def test_a_fresh_module_holds_zeros():
    module = Conv1d4bit(2, 3, 3)
    assert torch.equal(store_for(module).read(), torch.zeros(3, 2, 3))
    assert repr(module) == "Conv1d4bit(2, 3, kernel_size=(3,), stride=(1,), quant_type=nf4)"


@pytest.mark.parametrize("other", [Bnb4bit("fp4", 64, True), Bnb4bit("nf4", 128, True), Bnb4bit("nf4", 64, False)])
@pytest.mark.parametrize("strict", [True, False])
def test_state_of_another_format_is_refused(other, strict):
    _, module = pair()
    before = bytes_of(module)
    state = pair(quantizer=other)[1].state_dict()
    with pytest.raises(RuntimeError):
        module.load_state_dict(state, strict=strict)
    if other.blocksize == 64:
        assert same(before, bytes_of(module))


def test_casts_change_the_compute_dtype_and_never_the_bytes():
    for quantizer in (Nf4(), Bnb4bit("nf4", 64, False)):
        _, module = pair(quantizer=quantizer)
        before = bytes_of(module)
        for cast, dtype in (
            (lambda m: m.to(torch.bfloat16), torch.bfloat16),
            (lambda m: m.half(), torch.float16),
            (lambda m: m.float(), torch.float32),
            (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
        ):
            cast(nn.Sequential(module))
            assert (module.compute_dtype, module.bias.dtype) == (dtype, dtype)
            assert same(before, bytes_of(module))
            assert module(torch.randn(1, 6, 5, 5)).dtype == torch.float32
        with pytest.raises(UnsupportedError, match=r"\.to\(dtype\)"):
            module.type(torch.float32)
        assert same(before, bytes_of(module))


def test_meta_has_the_right_sizes_and_shapes():
    _, module = pair(padding=1)
    nbytes = store_for(module).nbytes
    built = Nf4().quantize(nn.Conv2d(6, 12, 3, padding=1, device="meta"), torch.bfloat16)
    moved = copy.deepcopy(module).to("meta")
    for meta in (built, moved):
        assert store_for(meta).nbytes == nbytes
        assert store_for(meta).device.type == "meta"
        x = torch.empty(2, 6, 5, 5, device="meta", requires_grad=True)
        meta(x).sum().backward()
        assert x.grad.shape == x.shape
    moved.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert same(bytes_of(moved), bytes_of(module))


def test_deepcopy_and_pickle_are_independent():
    _, module = pair()
    before = bytes_of(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same(before, bytes_of(twin))
        store_for(twin).write(torch.ones(12, 6, 3, 3))
        assert same(before, bytes_of(module))


def test_write_keeps_identity_and_checks_the_shape():
    dense, module = pair()
    weight = module.weight
    store_for(module).write(torch.ones(12, 6, 3, 3))
    assert torch.allclose(store_for(module).read(), torch.ones(12, 6, 3, 3), atol=1e-3)
    store_for(module).write(dense.weight)
    assert module.weight is weight
    assert same(bytes_of(module), bytes_of(Nf4().quantize(dense, torch.float32)))
    with pytest.raises(RequestError, match="shape"):
        store_for(module).write(torch.ones(12, 6, 9))


def test_autocast_computes_in_the_layers_dtype_and_returns_the_inputs():
    _, module = pair()
    x = torch.randn(1, 6, 5, 5, requires_grad=True)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_checkpointing_and_train_eval_train():
    _, module = pair(padding=1)
    gradients = []
    for mode in (True, False, True):
        x = torch.ones(1, 6, 5, 5, requires_grad=True)
        torch.utils.checkpoint.checkpoint(module.train(mode), x, use_reentrant=False).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
