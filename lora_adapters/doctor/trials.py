"""Small trials of what a feature needs. Each takes a second at most and raises if something is wrong."""

from __future__ import annotations

from datetime import timedelta


def train(device: str, dtype: str = "float32", quantization: str | None = None) -> None:
    """Attach an adapter to a tiny model and train it for three steps; its loss must fall."""
    import torch

    from ..api import attach
    from ..testing.checks import train as train_steps
    from ..testing.models import TinyMLP

    torch.manual_seed(0)
    model = TinyMLP().to(device, getattr(torch, dtype))
    inputs = {"x": torch.randn(4, 64, device=device, dtype=getattr(torch, dtype))}
    adapter = attach(model, rank=4, quantization=quantization, progress=False)
    losses = train_steps(adapter.model, inputs, lambda scores: scores.float().square().mean(), 3)
    if not losses[2] < losses[0]:
        raise RuntimeError(f"three training steps took the loss from {losses[0]:.4g} to {losses[2]:.4g}")


def quantize_and_train(quantization: str, device: str) -> None:
    """Quantize two tiny layers, compare what is read back, the forward and the gradient; then train an adapter on it.

    The second layer's size is one that bitsandbytes gets wrong on some CPUs and that we have a class of our own for.
    """
    import torch
    from torch import nn

    from ..weights import Int8, Nf4

    torch.manual_seed(0)
    # NF4's widest gap is 0.30 of a block's maximum. INT8 rounds to 1/254 of a row's.
    quantizer, coarse = (Nf4(), 0.17) if quantization == "nf4" else (Int8(), 0.005)
    for size in (64, 96):
        linear = nn.Linear(size, 64).to(device)
        layer = quantizer.quantize(linear, torch.float32)
        store = quantizer.store(layer)
        if store is None:
            raise RuntimeError(f"{type(layer).__name__} is not known again as {quantization}")
        weight = store.read(torch.float32)
        x, dy = torch.randn(4, size, device=device, requires_grad=True), torch.randn(4, 64, device=device)
        y = layer(x)
        y.backward(dy)
        assert x.grad is not None, "no gradient reaches the input of a quantized layer"
        _close(weight, linear.weight, coarse, f"the weight of a {size} x 64 layer, read back")
        # bitsandbytes multiplies 8-bit weights on a GPU with an input rounded to 8 bits.
        _close(y, x @ weight.T + linear.bias, 0.03, f"the forward of a {size} x 64 layer")
        _close(x.grad, dy @ weight, 0.03, f"the gradient of a {size} x 64 layer")
    train(device, quantization=quantization)


def _close(value, expected, tolerance: float, what: str) -> None:
    from ..testing.checks import relative_error

    error = relative_error(value.detach(), expected.detach())
    if not error <= tolerance:
        raise RuntimeError(f"{what}, is wrong by {error:.1%}")


def import_trainer() -> None:
    """Import Trainer and what it imports, and load the backend that knows transformers' classes."""
    from transformers import Trainer

    from ..hooks.manager import load_object, plugins

    load_object(next(spec for spec in plugins().backends() if spec.name == "transformers").target)()
    assert Trainer


def one_process_group() -> None:
    """Open and close a group of this process alone: the network's part of it fails already here where it is broken."""
    import torch
    import torch.distributed as distributed

    if not distributed.is_gloo_available():
        return
    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=10)
    )
    try:
        distributed.all_reduce(torch.ones(1))
    finally:
        distributed.destroy_process_group()
