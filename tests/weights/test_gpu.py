"""The stores on CUDA: the same promises as on the CPU, and moves between the two."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_adapters.weights import Bnb4bit, Fp4, Int8, Nf4, quantize_modules, store_for

pytestmark = pytest.mark.gpu
LAYERS = [
    lambda dtype: nn.Linear(96, 64, dtype=dtype, device="cuda"),
    lambda dtype: nn.Linear(33, 7, dtype=dtype, device="cuda"),
    lambda dtype: nn.Conv2d(6, 12, 3, padding=1, groups=3, dtype=dtype, device="cuda"),
    lambda dtype: nn.Conv1d(5, 3, 3, dtype=dtype, device="cuda"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("quantizer", [Nf4(), Fp4(), Bnb4bit("nf4", 128, False)], ids=str)
def test_4bit_reads_computes_and_differentiates(quantizer, make, dtype):
    torch.manual_seed(0)
    dense = make(dtype)
    module = quantizer.quantize(dense, dtype)
    store = store_for(module)
    assert store.device.type == "cuda"
    assert store.nbytes == quantizer.nbytes(store.shape)
    weight = store.read()
    assert (weight - dense.weight).abs().max() <= 0.22 * dense.weight.abs().max()
    # A value half-way between two codes may round either way: by at most the largest step.
    on_cpu = store_for(quantizer.quantize(copy.deepcopy(dense).cpu(), dtype)).read().float()
    difference = (on_cpu - weight.cpu().float()).abs()
    assert difference.max() <= 0.36 * weight.abs().max()
    assert (difference > 0.01 * weight.abs().max().item()).float().mean() < 0.02
    size = {2: (2, 3), 3: (2, dense.weight.shape[1], 9), 4: (2, 6, 9, 9)}[dense.weight.dim()]
    size = (*size, dense.weight.shape[1]) if dense.weight.dim() == 2 else size
    x = torch.randn(size, device="cuda", dtype=dtype, requires_grad=True)
    y, expected = module(x), store.dense_module(weight)(x)
    tolerance = 40 * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    tolerance = max(tolerance, 5e-3) if dtype == torch.float32 else tolerance  # TF32 convolutions
    assert (y - expected).abs().max() <= tolerance
    (dx,) = torch.autograd.grad(y.sum(), x)
    (dx2,) = torch.autograd.grad(expected.sum(), x)
    assert (dx - dx2).abs().max() <= 4 * tolerance
    store.write(dense.weight * 0)
    assert torch.equal(store.read(), torch.zeros_like(weight))


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("quantizer", [Nf4(), Bnb4bit("fp4", 64, False)], ids=str)
def test_there_and_back(quantizer, make):
    module = quantizer.quantize(make(torch.float32).cpu(), torch.float32)
    weight, nbytes = store_for(module).read(), store_for(module).nbytes
    nn.Sequential(module).to("cuda")
    assert store_for(module).device.type == "cuda"
    assert store_for(module).nbytes == nbytes
    assert torch.equal(store_for(module).read().cpu(), weight)
    nn.Sequential(module).to("cpu")
    assert torch.equal(store_for(module).read(), weight)


def test_int8():
    dense = nn.Linear(96, 64, device="cuda", dtype=torch.float16)
    module = Int8().quantize(dense, torch.float16)
    store = store_for(module)
    assert store.nbytes == Int8().nbytes(store.shape)
    for shape in ((4, 96), (2, 4, 96)):
        x = torch.randn(shape, device="cuda", dtype=torch.float16, requires_grad=True)
        y = module(x)
        assert (y - F.linear(x, store.read(), dense.bias)).norm() <= 0.03 * y.norm()
        y.sum().backward()
        assert torch.allclose(x.grad, torch.ones_like(y) @ store.read(), atol=0.02)
    store.write(dense.weight * 2)
    assert torch.allclose(store.read(), dense.weight * 2, atol=0.01)


def test_quantizing_a_model_needs_one_extra_layer():
    width, layers = 2048, 8
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, device="cuda") for _ in range(layers)))
    quantize_modules(nn.Sequential(nn.Linear(64, 64, device="cuda")), {"0": Nf4()}, torch.float32)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantize_modules(model, {str(i): Nf4() for i in range(layers)}, torch.float32)
    layer = 4 * width * width
    assert torch.cuda.max_memory_allocated() - before <= layer
    assert torch.cuda.memory_allocated() <= before - layers * layer * 0.8
