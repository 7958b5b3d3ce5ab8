"""lora_B of a layer of which only parts are adapted: q and v of a fused qkv, each by ranks of its own.

A stacks the parts' A. B is zero outside the blocks where a part's rows meet its ranks, and stays so whatever an optimizer
or a user writes there: `weight` is the parameter times a mask, for every reader. So the layer is plain LoRA of the sum of
the ranks, which PEFT saves and loads as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from ..targets import Part


def mask_of(parts: Sequence[Part], out: int, device: torch.device) -> torch.Tensor:
    """Return a bool tensor (out, sum of the parts' ranks): True where a part's rows meet its ranks."""
    mask = torch.zeros(out, sum(part.rank for part in parts), dtype=torch.bool)
    start = 0
    for part in parts:
        for first, end in part.rows:
            mask[first:end, start : start + part.rank] = True
        start += part.rank
    return mask.to(device)


class _Masked:
    """Comes before the class of an ordinary lora_B; `mask` is a buffer that no checkpoint holds."""

    _parameters: dict[str, Any]
    _buffers: dict[str, Any]

    @property
    def weight(self) -> torch.Tensor:
        """The weight that counts, (out, rank, 1...): gradients reach the parameter where the mask is True."""
        weight = self._parameters["weight"]
        return weight * self._buffers["mask"].view(weight.shape)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if not keep_vars:
            destination[prefix + "weight"] = self.weight.detach()


class MaskedLinear(_Masked, nn.Linear):  # type: ignore[misc]
    """lora_B of a linear layer."""


class MaskedConv1d(_Masked, nn.Conv1d):  # type: ignore[misc]
    """lora_B of a 1-d convolution."""


class MaskedConv2d(_Masked, nn.Conv2d):  # type: ignore[misc]
    """lora_B of a 2-d convolution."""


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
}


def masked(up: nn.Module, mask: torch.Tensor | None) -> nn.Module:
    """Return lora_B, turned in place into one that this mask (out, rank) holds at zero; as it is without a mask."""
    if mask is not None:
        up.register_buffer("mask", mask, persistent=False)
        up.__class__ = _CLASSES[type(up)]
    return up


def effective_weight(factor: nn.Module) -> torch.Tensor:
    """Return the weight that counts of lora_A or lora_B: the parameter itself unless it is masked."""
    return factor.weight if isinstance(factor, _Masked) else factor._parameters["weight"]  # type: ignore[return-value]
