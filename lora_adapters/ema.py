"""A moving average of the values that an adapter trains: the base is not copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class AdapterEma:
    """Averages every trainable parameter of a model: average = d * average + (1 - d) * value after each step.

    d is min(decay, (1 + step) / (10 + step)), so that short trainings leave their start behind (as TensorFlow's
    ExponentialMovingAverage counts with num_updates). Averages are kept in float32 on the parameter's device.

    Args:
        model: the model with its adapter.
        decay: at least 0, below 1.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9998) -> None:
        self.decay = decay
        self.averages = {name: p.detach().float().clone() for name, p in _trained(model)}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the values after step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in _trained(model):
            self.averages[name].lerp_(parameter.detach().float(), 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within this context the model has the averages, cast to the parameters' dtypes."""
        kept = [(p, p.detach().clone()) for _, p in _trained(model)]
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(self.averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in kept:
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, name -> float32 tensor."""
        return dict(self.averages)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the averages that `state_dict` returned."""
        for name, average in self.averages.items():
            average.copy_(state[name])


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
