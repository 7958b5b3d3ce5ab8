"""The norm of an update, against the update itself."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_adapters.norms import update_norm


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


@pytest.mark.parametrize(
    "a, b",
    [
        (random(4, 7), random(5, 4)),
        (random(1, 7), random(5, 1)),
        (random(4, 3, 3), random(6, 4, 1)),
        (random(4, 2, 3, 3), random(6, 4, 1, 1)),
    ],
    ids=["linear", "rank 1", "conv1d", "conv2d"],
)
@pytest.mark.parametrize("scaling", [0.5, -2.0, 0.0])
def test_it_is_the_norm_of_the_product(a, b, scaling):
    product = scaling * b.flatten(1) @ a.flatten(1)
    assert update_norm(a, b, scaling).item() == pytest.approx(product.norm().item(), rel=1e-5)


def test_a_grouped_convolution_of_stock_peft():
    """Its A sees all channels and its B is grouped: the kernel of the two together is their response to impulses."""
    base = torch.nn.ModuleDict({"conv": torch.nn.Conv1d(6, 9, 3, groups=3, bias=False)})
    layer = get_peft_model(base, LoraConfig(r=6, lora_alpha=6, target_modules=["conv"])).base_model.model["conv"]
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_B["default"].weight.copy_(random(9, 2, 1))
        kernel = layer(torch.eye(6 * 3).reshape(18, 6, 3)).reshape(18, 9).T
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((6, 6, 3), (9, 2, 1))
    assert update_norm(a, b, 1.0).item() == pytest.approx(kernel.norm().item(), rel=1e-5)


def test_16_bit_factors_are_multiplied_in_float32():
    a, b = random(8, 300).bfloat16(), random(200, 8).bfloat16()
    product = b.float() @ a.float()
    assert update_norm(a, b, 1.0).dtype == torch.float32
    assert update_norm(a, b, 1.0).item() == pytest.approx(product.norm().item(), rel=1e-5)


def test_float64_stays_and_does_not_overflow():
    a, b = torch.full((2, 3), 1e30, dtype=torch.float64), torch.full((3, 2), 1e30, dtype=torch.float64)
    assert update_norm(a, b, 1.0).item() == pytest.approx((b @ a).norm().item())


def test_an_update_of_zero():
    assert update_norm(random(4, 7), torch.zeros(5, 4), 1.0).item() == 0
