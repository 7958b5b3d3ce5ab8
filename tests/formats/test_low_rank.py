"""LoHa, LoKr and Tucker cores: their updates against PEFT's layers and against convolutions; as plain LoRA; truncated."""

import pytest
import torch
from format_models import loha, lokr, lora, tucker, values
from peft import LoHaConfig, LoKrConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from lora_adapters.formats import low_rank, truncated
from lora_adapters.formats.keys import factors_of, layers_of, tensors_for

LINEAR, CONV = (10, 12), (10, 8, 3, 3)


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(12, 10), nn.Conv2d(8, 10, 3)])
def test_loha_means_what_pefts_layer_computes(layer, core):
    conv = isinstance(layer, nn.Conv2d)
    if core and not conv:
        pytest.skip("a core is a convolution's")
    config = LoHaConfig(r=3, alpha=5, target_modules=["layer"], use_effective_conv2d=core, init_weights=False)
    model = get_peft_model(One(layer), config).base_model.model.layer
    tensors = {f"x.{name.split('.')[0]}": p for name, p in model.named_parameters() if name.startswith("hada")}
    factors = factors_of(layers_of(tensors | {"x.alpha": torch.tensor(5.0)}, "it")["x"], "it", (3, 3) if conv else ())
    wanted = model.get_delta_weight("default").double()
    assert factors.shape == tuple(layer.weight.shape)
    assert torch.allclose(factors.update(), wanted, atol=1e-5)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("rank, core", [(2, False), (2, True), (40, False)])
@pytest.mark.parametrize("layer", [nn.Linear(64, 48), nn.Conv2d(32, 48, 3)])
def test_lokr_means_what_pefts_layer_computes(layer, rank, core, both):
    conv = isinstance(layer, nn.Conv2d)
    options = dict(use_effective_conv2d=core, decompose_both=both, decompose_factor=-1, init_weights=False)
    model = get_peft_model(
        One(layer), LoKrConfig(r=rank, alpha=rank if rank == 40 else 5, target_modules=["layer"], **options)
    )
    model = model.base_model.model.layer
    tensors = {f"x.{name.split('.')[0]}": p for name, p in model.named_parameters() if name.startswith("lokr")}
    alpha = torch.tensor(float(rank if rank == 40 else 5))
    factors = factors_of(layers_of(tensors | {"x.alpha": alpha}, "it")["x"], "it", (3, 3) if conv else ())
    assert factors.shape == tuple(layer.weight.shape)
    assert torch.allclose(factors.update(), model.get_delta_weight("default").double(), atol=1e-5)


def test_a_core_is_the_convolution_between_down_and_up():
    factors = tucker(CONV)
    x = values(2, 8, 7, 7, seed=9).double()
    a, mid, b = (tensor.double() for tensor in (factors.a, factors.mid, factors.b))
    wanted = factors.scaling * F.conv2d(F.conv2d(F.conv2d(x, a), mid), b)
    assert torch.allclose(F.conv2d(x, factors.update()), wanted, atol=1e-12)


CASES = {
    "LoHa": lambda dtype: loha(LINEAR, dtype=dtype),
    "LoHa of a convolution": lambda dtype: loha(CONV, dtype=dtype),
    "LoHa with cores": lambda dtype: loha(CONV, core=True, dtype=dtype),
    "LoHa above the layer's rank": lambda dtype: loha(LINEAR, rank=5, dtype=dtype),
    "LoKr": lambda dtype: lokr(LINEAR, dtype=dtype),
    "LoKr of products": lambda dtype: lokr((24, 32), (4, 4), rank=2, w1="product", dtype=dtype),
    "LoKr whole": lambda dtype: lokr(LINEAR, w2="whole", dtype=dtype),
    "LoKr of a convolution": lambda dtype: lokr((12, 8, 3, 3), dtype=dtype),
    "LoKr with a core": lambda dtype: lokr((12, 8, 3, 3), w2="core", dtype=dtype),
    "LoKr of a whole convolution": lambda dtype: lokr((12, 8, 3, 3), w2="whole", dtype=dtype),
    "Tucker": lambda dtype: tucker(CONV, dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_as_plain_lora_the_update_is_the_same(make, dtype):
    factors = make(dtype)
    lora_factors = low_rank(factors)
    assert lora_factors.mid is None
    assert lora_factors.shape == factors.shape
    wanted = factors.update()
    tolerance = 1e-12 if dtype == torch.float64 else 3e-7
    assert (lora_factors.update() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("make", [CASES["LoHa"], CASES["LoHa of a convolution"]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_16_bits_are_not_rounded(make, dtype):
    factors = make(dtype)
    made = low_rank(factors)
    one = (factors.w1_a.double()[:, :, None] * factors.w2_a.double()[:, None]).flatten(1)
    assert torch.equal(made.b.flatten(1).double(), one)
    assert made.rank == factors.rank**2


def test_the_rank_is_never_above_the_layers():
    assert low_rank(loha(LINEAR, rank=5)).rank == 10
    assert low_rank(lokr(LINEAR, w2="whole")).rank == min(2, 4) * min(5, 3)
    assert low_rank(lokr((64, 64), (2, 2), rank=3)).rank == 6


def test_plain_lora_is_left_as_it_is():
    factors = lora(LINEAR)
    assert low_rank(factors) is factors


@pytest.mark.parametrize("make", [*CASES.values(), lambda dtype: lora(CONV, 6, 2.5, dtype=dtype)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncating_is_the_best_and_says_what_is_lost(make, rank):
    factors = make(torch.float64)
    made, error = truncated(factors, rank)
    dense = factors.update().flatten(1)
    singular = torch.linalg.svdvals(dense)
    best = (singular[rank:].square().sum().sqrt() / singular.square().sum().sqrt()).item()
    assert made.rank <= rank
    assert error == pytest.approx(best, abs=1e-7)
    assert ((made.update().flatten(1) - dense).norm() / dense.norm()).item() == pytest.approx(error, abs=1e-7)


def test_truncating_nothing_loses_nothing():
    factors = lora(LINEAR, 4)
    made, error = truncated(factors, 4)
    assert made is factors
    assert error == 0


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_tensors_and_back(make):
    factors = make(torch.float16)
    tensors = {f"x{end}": tensor for end, tensor in tensors_for(factors, "kohya").items()}
    back = factors_of(layers_of(tensors, "it")["x"], "it", factors.shape[2:])
    assert back.alpha == factors.alpha
    assert back.shape == factors.shape
    assert back.tensors.keys() == factors.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in factors.tensors.items())
