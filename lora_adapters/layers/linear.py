"""LoRA for dense linear layers (arXiv 2106.09685): y = x W^T + bias + scaling * dropout(x) A^T B^T."""

from __future__ import annotations

from peft.tuners.lora import layer as peft_layers
from torch import nn

from .engine import EngineLayer, Factors, bare_linear
from .fused import FusedLinear
from .part_factors import masked


class LinearFactors(FusedLinear, EngineLayer):
    """Factors of every layer that maps (..., in) to (..., out): A is (rank, in), B is (out, rank)."""

    def _prepare(self, base: nn.Module) -> None:
        # transformers' Conv1D stores its weight as (in, out).
        self.is_target_conv_1d_layer = type(base).__name__ == "Conv1D"
        self.fan_in_fan_out = self.is_target_conv_1d_layer

    def _set_factors(self, name: str, factors: Factors) -> None:
        self.lora_A._modules[name] = bare_linear(factors.a)
        self.lora_B._modules[name] = masked(bare_linear(factors.b, factors.bias), factors.mask)


class Linear(LinearFactors, peft_layers.Linear):
    """LoRA on nn.Linear and transformers' Conv1D."""
