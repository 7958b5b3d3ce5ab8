"""The modules that hold A where a grouped convolution's groups share it."""

from __future__ import annotations

import torch
from torch import nn


class _Shared:
    """A convolution whose groups all use one kernel: input (N, groups * c, ...) to output (N, groups * rank, ...)."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        repeated = weight.repeat(self.groups, *[1] * (weight.dim() - 1))  # type: ignore[attr-defined]
        return super()._conv_forward(input, repeated, bias)  # type: ignore[misc]


class SharedConv1d(_Shared, nn.Conv1d):
    """lora_A of a grouped 1-d convolution."""


class SharedConv2d(_Shared, nn.Conv2d):
    """lora_A of a grouped 2-d convolution."""
