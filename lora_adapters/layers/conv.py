"""LoRA for convolutions: a low-rank update of the kernel, for any groups, stride, padding and dilation.

The kernel W of shape (out, in / groups, *k) is updated by scaling * B @ A, where A (rank, in / groups, *k) is a
convolution with the base's own geometry and B (out, rank, 1...) a pointwise one. With groups > 1 every group shares A,
which makes the update exactly a low-rank matrix of W's flattened shape (out, in / groups * prod(k)): it merges, and
any rank is allowed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as peft_layers
from torch import nn

from .conv_parts import SharedConv1d, SharedConv2d
from .engine import EngineLayer, Factors
from .fused import FusedConv
from .part_factors import effective_weight, masked


def _with_weight(conv: type[nn.Module], weight: torch.Tensor, bias: torch.Tensor | None, **geometry: Any) -> nn.Module:
    with torch.device("meta"):
        layer = conv(bias=bias is not None, **geometry)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


class _Conv(FusedConv, EngineLayer):
    shared: type[nn.Module]
    plain: type[nn.Module]

    def _prepare(self, base: nn.Module) -> None:
        self._kernel_dim = self.plain_dim

    @property
    def plain_dim(self) -> int:
        return 4 if self.plain is nn.Conv2d else 3

    def _set_factors(self, name: str, factors: Factors) -> None:
        base: Any = self.get_base_layer()
        self.lora_A[name] = _with_weight(
            self.shared if base.groups > 1 else self.plain,
            factors.a,
            None,
            in_channels=base.in_channels,
            out_channels=base.groups * factors.rank,
            kernel_size=base.kernel_size,
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            groups=base.groups,
            padding_mode=base.padding_mode,
        )
        up = _with_weight(
            self.plain,
            factors.b,
            factors.bias,
            in_channels=base.groups * factors.rank,
            out_channels=base.out_channels,
            kernel_size=1,
            groups=base.groups,
        )
        self.lora_B[name] = masked(up, factors.mask)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return scaling * B @ A with shape (out, in / groups, *kernel), in the adapter's dtype."""
        a, b = (effective_weight(factor[adapter]) for factor in (self.lora_A, self.lora_B))
        delta = b.flatten(1) @ a.flatten(1) * self.scaling[adapter]
        return delta.view(b.shape[0], *a.shape[1:])


class Conv1d(_Conv, peft_layers.Conv1d):
    """LoRA on nn.Conv1d and its 4-bit form."""

    shared, plain = SharedConv1d, nn.Conv1d
    conv_fn = staticmethod(F.conv1d)


class Conv2d(_Conv, peft_layers.Conv2d):
    """LoRA on nn.Conv2d and its 4-bit form."""

    shared, plain = SharedConv2d, nn.Conv2d
    conv_fn = staticmethod(F.conv2d)
