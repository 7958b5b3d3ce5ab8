"""Tiny models in plain PyTorch, one for each kind of layer. Each makes its own inputs and runs in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class TinyMLP(nn.Module):
    """Linear layers only: (batch, 64) -> (batch, 10)."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(blocks)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return class scores (batch, 10)."""
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    def example_inputs(self, batch_size: int = 2, device: Any = "cpu") -> dict[str, torch.Tensor]:
        """Return keyword arguments of `forward`."""
        return {"x": torch.randn(batch_size, 64, device=device)}


class TinyConv(nn.Module):
    """Convolutions in one and two dimensions, plain, strided, dilated and grouped: (batch, 3, 8, 8) -> (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4)
        self.sequence = nn.Conv1d(16, 32, 3, padding=1, bias=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return class scores (batch, 10)."""
        x = F.relu(self.mix(F.relu(self.stem(x))))
        return self.head(F.relu(self.sequence(x.flatten(2))).mean(2))

    def example_inputs(self, batch_size: int = 2, device: Any = "cpu") -> dict[str, torch.Tensor]:
        """Return keyword arguments of `forward`."""
        return {"x": torch.randn(batch_size, 3, 8, 8, device=device)}


class TinyText(nn.Module):
    """One attention block over an embedding: token ids (batch, length) -> (batch, length, 100)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(64, 100, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return token scores (batch, length, 100)."""
        x = self.embedding(ids)
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True))
        return self.head(x + self.down(F.gelu(self.up(x))))

    def example_inputs(self, batch_size: int = 2, device: Any = "cpu") -> dict[str, torch.Tensor]:
        """Return keyword arguments of `forward`."""
        return {"ids": torch.randint(100, (batch_size, 6), device=device)}
