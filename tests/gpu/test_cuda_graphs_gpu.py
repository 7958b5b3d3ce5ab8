"""Replayed steps are those of plain backward: losses and gradients, over shapes, accumulation, dropout and 4-bit bases."""

import pytest
import torch
from torch import nn

import lora_adapters as la
from lora_adapters.errors import RequestError, UnsupportedError

pytestmark = pytest.mark.gpu


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, padding=1)
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.second(torch.nn.functional.gelu(self.first(self.conv(x).mean((-1, -2)))))


def made(dropout=0.0, quantization=None):
    torch.manual_seed(0)
    model = Net().cuda()
    adapter = la.attach(
        model, rank=4, targets=["conv", "first", "second"], dropout=dropout, quantization=quantization, seed=0
    )
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.train(), list(adapter.parameters())


def batch(rows, seed, mask=True):
    generator = torch.Generator().manual_seed(seed)
    found = {"x": torch.randn(rows, 3, 9, 9, generator=generator), "y": torch.randn(rows, 64, generator=generator)}
    return {**found, "mask": torch.rand(rows, 64, generator=generator) if mask else None}


def loss_of(model, dtype=None):
    def loss(given):
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            squares = (model(given["x"].cuda()).float() - given["y"].cuda()).square()
        return (squares if given["mask"] is None else squares * given["mask"].cuda()).mean()

    return loss


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_steps_are_those_of_backward(dtype, quantization):
    (plain, expected), (model, trained) = made(quantization=quantization), made(quantization=quantization)
    loss, graphed = loss_of(plain, dtype), la.GraphedLoss(loss_of(model, dtype), trained)
    optimizers = [torch.optim.SGD(parameters, lr=0.1) for parameters in (expected, trained)]
    for step, (rows, mask) in enumerate([(4, True), (3, True), (4, True), (4, False), (3, True), (4, True)]):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        for part in range(2):  # gradients of two batches add up
            given = batch(rows, 10 * step + part, mask)
            value = loss(given)
            value.backward()
            torch.testing.assert_close(graphed(given), value.detach(), rtol=1e-5, atol=1e-6)
        for one, other in zip(trained, expected, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    assert len(graphed._recorded) == 3


def test_dropout_draws_anew_at_each_replay():
    model, trained = made(dropout=0.5)
    graphed = la.GraphedLoss(loss_of(model), trained)
    values = {round(graphed(batch(4, 0)).item(), 6) for _ in range(6)}
    assert len(values) > 3


def test_recording_leaves_gradients_and_the_generator():
    model, trained = made()
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    before = torch.cuda.get_rng_state()
    graphed = la.GraphedLoss(loss_of(model), trained)
    graphed(batch(4, 0))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    kept = [p.grad.clone() for p in trained]
    for parameter in trained:
        parameter.grad = None
    graphed(batch(4, 0))
    for parameter, old in zip(trained, kept, strict=True):
        torch.testing.assert_close(parameter.grad + 1, old, rtol=1e-4, atol=1e-5)


def test_after_clear_the_model_as_it_is_now_is_recorded():
    model, trained = made()
    graphed = la.GraphedLoss(loss_of(model), trained)
    first = graphed(batch(4, 0))
    with torch.no_grad():
        model.second.get_base_layer().bias = nn.Parameter(torch.ones(64, device="cuda"), requires_grad=False)
    assert torch.equal(graphed(batch(4, 0)), first)
    graphed.clear()
    assert not torch.equal(graphed(batch(4, 0)), first)


def test_what_can_not_be_recorded():
    model, trained = made()
    with pytest.raises(RequestError, match="one number"):
        la.GraphedLoss(lambda given: model(given["x"]), trained)(batch(4, 0))
    with pytest.raises(RequestError, match="nothing to train"):
        la.GraphedLoss(loss_of(model), [])
    with pytest.raises(UnsupportedError, match="CUDA device"):
        la.GraphedLoss(loss_of(model), [nn.Parameter(torch.zeros(1))])
