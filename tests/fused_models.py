"""A model whose q, k and v are fused in three layouts and separate in a fourth, and a backend that knows the rows."""

from __future__ import annotations

import torch
from torch import nn

from lora_adapters import hookimpl
from lora_adapters.hooks.manager import plugins
from lora_adapters.hooks.specs import BackendSpec
from lora_adapters.targets import Classification

HEADS, KEY, VALUE, WIDTH = 2, 8, 16, 64


def rows(layout: str) -> dict:
    """Return role -> rows: [q | k | v], or [q | k | v] for each head in turn ("interleaved")."""
    sizes = {"q": KEY, "k": KEY, "v": VALUE}
    found: dict = {role: [] for role in sizes}
    start = 0
    if layout == "interleaved":
        for _ in range(HEADS):
            for role, size in sizes.items():
                found[role].append((start, start + size))
                start += size
    else:
        for role, size in sizes.items():
            found[role].append((start, start + HEADS * size))
            start += HEADS * size
    return {role: tuple(ranges) for role, ranges in found.items()}


class Attention(nn.Module):
    """Attention over (batch, tokens, 64); `layout` is "contiguous", "interleaved", "conv" or "separate"."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        out = HEADS * (2 * KEY + VALUE)
        if layout == "separate":
            self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * size) for size in (KEY, KEY, VALUE))
        else:
            self.qkv = nn.Conv2d(WIDTH, out, 1) if layout == "conv" else nn.Linear(WIDTH, out)
        self.proj = nn.Linear(HEADS * VALUE, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        if self.layout == "separate":
            q, k, v = (p(x).view(batch, tokens, HEADS, -1) for p in (self.q, self.k, self.v))
        else:
            if self.layout == "conv":
                fused = self.qkv(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
            else:
                fused = self.qkv(x)
            mine = rows(self.layout)
            q, k, v = (
                torch.cat([fused[..., a:b] for a, b in mine[role]], -1).view(batch, tokens, HEADS, -1)
                for role in ("q", "k", "v")
            )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = (q @ k.transpose(2, 3) * KEY**-0.5).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


class FusedNet(nn.Module):
    """One attention of each of the layouts."""

    def __init__(self, layouts: tuple[str, ...] = ("contiguous", "interleaved", "conv", "separate")) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(layout) for layout in layouts])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class FusedBackend:
    """Knows FusedNet."""

    name = "fused"
    quantized_roles = ("q", "k", "v", "o", "qkv")
    #: What tests change.
    bounded = False
    knows_rows = True

    def family(self, model):
        return type(model).__name__

    def classify(self, info, maps):
        ends = {"q": "q", "k": "k", "v": "v", "proj": "o", "qkv": "qkv", "head": "head"}
        roles = {name: ends[name.rpartition(".")[2]] for name in info.modules}
        parts = {
            name: rows(info.model.get_submodule(name.rpartition(".")[0]).layout)
            for name, role in roles.items()
            if role == "qkv" and self.knows_rows
        }
        return Classification(roles, {}, "attention", parts=parts, bounded=self.bounded)

    def task_type(self, model):
        return None

    def heads_to_train(self, model):
        return ("head",)


def register() -> None:
    """Make the backend known for the rest of a test."""

    class Plugin:
        @hookimpl
        def lora_adapters_backends(self):
            return [BackendSpec("fused", ("fused_models",), "fused_models:FusedBackend", priority=9)]

    plugins().register(Plugin(), "fused")


def fused_net(seed: int = 0, **options) -> FusedNet:
    torch.manual_seed(seed)
    return FusedNet(**options).eval()


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
