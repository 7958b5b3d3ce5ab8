"""LoRA for embeddings: E[i] + scaling * (B @ A)[:, i], with A (rank, rows) and B (dim, rank)."""

from __future__ import annotations

from peft.tuners.lora import layer as peft_layers
from torch import nn

from .engine import EngineLayer, Factors
from .fused import FusedEmbedding


class Embedding(FusedEmbedding, EngineLayer, peft_layers.Embedding):
    """LoRA on nn.Embedding and its subclasses."""

    def _prepare(self, base: nn.Module) -> None:
        self.fan_in_fan_out = False
        # Tensor-parallel bases never get here: planning leaves them to PEFT's own injection.
        self.device_mesh = self.tp_layer = None
        self.other_param_names = (*type(self).other_param_names, "input_fns", "output_fns")
        self.input_fns, self.output_fns = {}, {}

    def _set_factors(self, name: str, factors: Factors) -> None:
        self.lora_embedding_A[name] = nn.Parameter(factors.a)
        self.lora_embedding_B[name] = nn.Parameter(factors.b)
