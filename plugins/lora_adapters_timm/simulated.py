"""A forward pass of a timm model without data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_adapters.simulation import Copier, Tracker, quiet, rng_untouched

_DEVICE = torch.device("cpu")


def forward(
    model: nn.Module,
    shape: tuple[int, int, int],
    watching: Callable[[nn.Module], AbstractContextManager[Any]] = lambda copy: nullcontext(),
) -> None:
    """Run a copy of the model that has shapes but no values, in eval mode, on one image. The model is only looked at.

    Args:
        model: on any device, "meta" included; quantized and adapted ones too.
        shape: (channels, height, width) of the image.
        watching: called with the copy; returns a context for the forward.

    Raises:
        Exception: whatever the forward raises on shapes alone, or on images of this shape.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with rng_untouched(), quiet(), warnings.catch_warnings(), mode, torch.no_grad():
        warnings.simplefilter("ignore")
        copier = Copier(mode, _DEVICE)
        copy = copier.copy(model)
        copy.eval()
        image = copier.input(torch.empty(1, *shape, device="meta"))
        dtype = next((p.dtype for p in copy.parameters() if p.dtype.is_floating_point), torch.float32)
        with Tracker(_DEVICE, simulated=True), watching(copy):
            copy(image.to(dtype))
