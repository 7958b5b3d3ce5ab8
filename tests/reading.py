"""A model that reads weights without calling their modules, and a backend that says so."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_adapters.direct_reads import owners_of, why_not_called


class Reader(nn.Module):
    """Computes F.linear and F.conv2d with weights that it reads; `called` is called."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.qkv = nn.Linear(24, 40, bias=False, dtype=dtype)
        self.bias = nn.Parameter(torch.randn(40, dtype=dtype))
        self.conv = nn.Conv2d(6, 8, 3, groups=2, dtype=dtype)
        self.called = nn.Linear(40, 5, dtype=dtype)

    def forward(self, x):
        image = F.conv2d(x[:, :, :6].unsqueeze(-1).transpose(1, 2), self.conv.weight, None, 1, (2, 3), 2, groups=2)
        return self.called(F.linear(x, weight=self.qkv.weight, bias=self.bias)) + image.mean()


def with_reads(monkeypatch: pytest.MonkeyPatch, backend: type) -> None:
    """Make a backend say who reads which weights, instead of leaving those out."""
    plain = backend.classify

    def classify(self, info, maps):
        classes = plain(self, info, maps)
        by_name = dict(info.model.named_modules(remove_duplicate=False))
        reads = {}
        for name, module in info.modules.items():
            base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            if reason := why_not_called(base, owners_of(name, by_name)):
                reads[name] = reason.split(" reads ")[0]
        never = {name: reason for name, reason in classes.never.items() if name not in reads}
        return replace(classes, never=never, reads={**reads, **classes.reads})

    monkeypatch.setattr(backend, "classify", classify)
