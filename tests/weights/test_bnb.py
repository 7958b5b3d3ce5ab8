"""bitsandbytes' linear layers: stores, quantizers, sizes, round trips and gradients."""

import copy
import io

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from safetensors.torch import load, save
from torch import nn

from lora_adapters.errors import RequestError
from lora_adapters.weights import Bnb4bit, Fp4, Int8, Nf4, Quantizer, WeightStore, store_for
from lora_adapters.weights.linear4bit import Linear4bit

FOUR_BIT = [Nf4(), Fp4(), Bnb4bit("nf4", 128, False), Bnb4bit("fp4", 32, False), Bnb4bit("nf4", 4096, True)]
SHAPES = [(96, 64), (64, 96), (33, 7), (100, 3), (2, 1), (1, 1), (320, 257)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(shape=(96, 64), dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(*shape, bias=bias, dtype=dtype)


def unpacked(module, dtype):
    """The definition, value by value: code[nibble] * maximum of its block."""
    state = module.weight.quant_state
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    packed = module.weight.flatten().int()
    values = state.code[torch.stack([packed >> 4, packed & 15], dim=1).flatten()][: state.shape.numel()]
    block = torch.arange(state.shape.numel()) // state.blocksize
    return (values * absmax[block]).to(dtype).reshape(state.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantizer", FOUR_BIT, ids=str)
def test_4bit_reads_what_bitsandbytes_reads(quantizer, shape, dtype):
    dense = linear(shape, dtype)
    before = dense.weight.detach().clone()
    module = quantizer.quantize(dense, dtype)
    assert isinstance(module, bnb.nn.Linear4bit)
    assert torch.equal(dense.weight, before)
    store = store_for(module)
    assert isinstance(store, WeightStore)
    assert isinstance(quantizer, Quantizer)
    assert store.format == quantizer.name
    assert store.shape == dense.weight.shape
    assert store.nbytes == quantizer.nbytes(store.shape)
    # bitsandbytes' kernel for fp16 rounds values that lie half-way differently on some CPUs.
    ulp = torch.finfo(dtype).eps if dtype == torch.float16 else 0
    torch.testing.assert_close(store.read(), unpacked(module, dtype), rtol=ulp, atol=0)
    # On CPUs with AVX512 bitsandbytes' own dequantization is right only for rows of whole blocks.
    if shape[0] % quantizer.blocksize == 0 or torch.backends.cpu.get_cpu_capability() != "AVX512":
        with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles a kernel for every odd width
            theirs = dequantize_4bit(module.weight, module.weight.quant_state)
        # It transposes a weight of a single byte.
        assert torch.equal(store.read(), theirs if module.weight.numel() > 1 else theirs.t())
    assert store.read().shape == store.shape
    # Half the largest step of the code, times the largest value of a block; nesting and rounding add a little.
    largest_step = {"nf4": 0.31, "fp4": 1 / 3}[quantizer.name]
    error = (store.read(torch.float32) - before.float()).abs().max()
    assert error <= (largest_step / 2 + 0.05) * before.float().abs().max()


@pytest.mark.parametrize("quantizer", [*FOUR_BIT, Int8()], ids=str)
def test_write_is_what_quantizing_gives_and_keeps_identity(quantizer):
    module = quantizer.quantize(linear(), torch.float32)
    module(torch.randn(2, 96))  # int8 moves its scales on the first forward
    other = linear((96, 64))
    with torch.no_grad():
        other.weight.mul_(3).add_(0.01)
    expected = store_for(quantizer.quantize(other, torch.float32)).read()
    weight = module.weight
    store = store_for(module)
    store.write(other.weight)
    assert module.weight is weight
    assert torch.equal(store.read(), expected)
    x = torch.randn(2, 96)
    assert torch.allclose(module.train()(x), F.linear(x, expected, module.bias), atol=1e-5)
    with pytest.raises(RequestError, match="shape"):
        store.write(torch.zeros(96, 64))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
def test_layers_made_by_others_can_be_read(storage, nested):
    dense = linear((128, 64), torch.bfloat16)
    theirs = bnb.nn.Linear4bit(
        128, 64, quant_type="fp4", compress_statistics=nested, quant_storage=storage, compute_dtype=torch.bfloat16
    )
    theirs.load_state_dict(dense.state_dict())
    assert store_for(theirs) is None, "not quantized yet"
    theirs.to("cpu")
    ours = Bnb4bit("fp4", nested=nested, quant_storage=storage).quantize(dense, torch.bfloat16)
    assert theirs.weight.dtype == ours.weight.dtype == storage
    # Bytes, because packed bytes shown as floats can be NaN.
    assert torch.equal(theirs.weight.view(torch.uint8), ours.weight.view(torch.uint8))
    assert torch.equal(store_for(theirs).read(), store_for(ours).read())
    store_for(theirs).write(torch.ones(64, 128))
    assert torch.allclose(store_for(theirs).read(), torch.ones(64, 128, dtype=torch.bfloat16), atol=0.01)


def test_sizes_bitsandbytes_mishandles_become_our_subclass():
    whole, ours = (Nf4().quantize(linear((width, 64)), torch.float32) for width in (128, 96))
    assert type(whole) is bnb.nn.Linear4bit
    assert isinstance(ours, Linear4bit)
    assert isinstance(ours, bnb.nn.Linear4bit)
    assert repr(ours) == "Linear4bit(in_features=96, out_features=64, bias=True)"
    x = torch.randn(2, 3, 96, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert torch.allclose(ours.bias.grad, torch.full((64,), 6.0))
    assert x.grad.dtype == torch.bfloat16
    assert ours.half()(x.detach().half()).dtype == torch.float16


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (100, 33), (64, 64)])
@pytest.mark.parametrize("quantizer", [Nf4(), Bnb4bit("fp4", 64, False)], ids=str)
def test_4bit_forward_and_input_gradient(quantizer, shape, mode):
    module = quantizer.quantize(linear(shape), torch.float32).train(mode)
    weight = store_for(module).read()
    x = torch.randn(2, 3, shape[0], requires_grad=True)
    y = module(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.allclose(y, F.linear(x, weight, module.bias), atol=1e-5)
    assert torch.allclose(x.grad, grad @ weight, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_reads_trains_and_evaluates(dtype):
    dense = linear(dtype=dtype)
    with torch.no_grad():
        dense.weight[3] = 0
    module = Int8().quantize(dense, dtype)
    store = store_for(module)
    assert (store.format, store.dtype, store.shape) == ("int8", dtype, (64, 96))
    assert store.nbytes == Int8().nbytes(store.shape)
    limit = dense.weight.abs().amax(1, keepdim=True).float() / 127 * 0.51 + 1e-3 * dense.weight.abs().max()
    assert ((store.read(torch.float32) - dense.weight.float()).abs() <= limit).all()
    for mode, tolerance in ((True, 1e-6), (False, 0.03), (True, 1e-6)):
        x = torch.randn(4, 96, dtype=dtype, requires_grad=True)
        y = module.train(mode)(x)
        expected = F.linear(x, store.read(), dense.bias)
        assert (y - expected).norm() <= max(tolerance, torch.finfo(dtype).eps) * expected.norm()
        y.sum().backward()
        assert torch.allclose(x.grad, torch.ones_like(y) @ store.read(), atol=0.05 if dtype != torch.float32 else 1e-4)


def test_int8_on_cpu_still_fails_where_the_docstring_says():
    """Once this fails, bitsandbytes has mended it: take the sentence out of Int8's docstring."""
    module = Int8().quantize(linear(), torch.float32).eval()
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 2, 4, 96))
    assert module.train()(torch.randn(2, 2, 4, 96)).shape == (2, 2, 4, 64)


def test_int8_refuses_what_fp16_cannot_hold():
    dense = linear()
    with torch.no_grad():
        dense.weight[0, 0] = 1e6
    with pytest.raises(RequestError, match="65504"):
        Int8().quantize(dense, torch.float32)


@pytest.mark.parametrize("quantizer", [Nf4(), Bnb4bit("fp4", 64, False), Int8()], ids=str)
def test_meta_modules_have_the_right_sizes(quantizer):
    real = quantizer.quantize(linear(), torch.bfloat16)
    module = quantizer.quantize(nn.Linear(96, 64, device="meta"), torch.bfloat16)
    assert type(module) is type(real)
    store = store_for(module)
    assert store.device.type == "meta"
    assert store.nbytes == quantizer.nbytes(store.shape) == store_for(real).nbytes
    assert store.read().shape == (64, 96)
    meta = {k: (v.shape, v.dtype) for k, v in module.state_dict().items() if "quant_state" not in k}
    assert meta == {k: (v.shape, v.dtype) for k, v in real.state_dict().items() if "quant_state" not in k}
    if not isinstance(quantizer, Int8):
        assert module(torch.empty(2, 96, device="meta", dtype=torch.bfloat16)).shape == (2, 64)


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("quantizer", [Nf4(), Bnb4bit("nf4", 64, False), Int8()], ids=str)
def test_deepcopy_and_pickle(quantizer, forward_first):
    module = quantizer.quantize(linear(), torch.float32)
    x = torch.randn(2, 96)
    if forward_first:
        module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    expected = store_for(module).read()
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(store_for(twin).read(), expected)
        assert torch.equal(twin(x), module(x))
        store_for(twin).write(torch.ones(64, 96))
        assert torch.equal(store_for(module).read(), expected), "the copy shares storage with the original"
        assert torch.allclose(twin(x), F.linear(x, torch.ones(64, 96), twin.bias), atol=0.05)


@pytest.mark.parametrize("quantizer", [Nf4(), Bnb4bit("fp4", 128, False)], ids=str)
def test_state_dict_through_safetensors(quantizer):
    module = quantizer.quantize(linear(), torch.float32)
    state = load(save({k: v.contiguous() for k, v in module.state_dict().items()}))
    statistics = {k: v for k, v in state.items() if k.startswith("weight.")}
    fresh = bnb.nn.Linear4bit(96, 64, compute_dtype=torch.float32, device="meta")
    fresh.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], statistics, device="cpu", module=fresh)
    fresh.bias = nn.Parameter(state["bias"])
    assert torch.equal(store_for(fresh).read(), store_for(module).read())
    assert store_for(fresh).nbytes == store_for(module).nbytes


def test_dense_module_and_settings():
    for quantizer in (Nf4(), Int8()):
        dense = linear(dtype=torch.float16).eval()
        dense.bias.requires_grad_(False)
        dense.register_forward_hook(lambda module, args, output: output + 1)
        module = quantizer.quantize(dense, torch.float32)
        assert not module.training
        assert not module.bias.requires_grad
        assert module.bias is not dense.bias
        back = store_for(module).dense_module(store_for(module).read(torch.float32))
        assert type(back) is nn.Linear
        assert (back.weight.dtype, back.bias.dtype) == (torch.float32, torch.float32)
        x = torch.randn(2, 96)
        assert torch.allclose(back(x), module.train()(x), atol=1e-5)
        assert module.bias is not back.bias


def test_unsupported_layers_and_settings_are_refused():
    for settings in ({"quant_type": "nf5"}, {"blocksize": 48}):
        with pytest.raises(RequestError):
            Bnb4bit(**settings)
    assert "fp32, bf16" in Nf4().supports(linear(dtype=torch.float64))
    assert "packed bytes" in Bnb4bit(quant_storage=torch.float32).supports(linear((3, 3)))
    assert "dense" in Nf4().supports(Nf4().quantize(linear(), torch.float32))
    assert "linear" in Int8().supports(nn.Conv2d(1, 1, 1))
    with pytest.raises(RequestError, match="Can't quantize to nf4"):
        Nf4().quantize(nn.LayerNorm(3), torch.float32)
