"""What both contracts need: copies, comparisons to the bit, a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import LoraAdaptersError


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a dense model on the meta device; what is shared stays shared."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def state_of(module: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Return copies of the tensors in `module.state_dict()`, those whose last name is in `skip` left out."""
    return {
        key: value.detach().clone()
        for key, value in module.state_dict().items()
        if isinstance(value, torch.Tensor) and key.rpartition(".")[2] not in skip
    }


def difference(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> str:
    """Return the first entry that differs in name, dtype or any bit, "" if none does."""
    if before.keys() != after.keys():
        return f"the entry {sorted(before.keys() ^ after.keys())[0]!r}"
    for key, old in before.items():
        new = after[key]
        if old.dtype != new.dtype or old.shape != new.shape:
            return f"{key} ({old.dtype} {tuple(old.shape)} -> {new.dtype} {tuple(new.shape)})"
        if not torch.equal(_bytes(old), _bytes(new)):
            return key
    return ""


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().as_subclass(torch.Tensor).cpu().contiguous().reshape(-1).view(torch.uint8)


def floats(result: Any) -> list[torch.Tensor]:
    """Return every floating tensor of a forward's result, detached."""
    return [t.detach().clone() for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max |value - expected| / max |expected|, in float32."""
    gap = (value.float() - expected.float()).abs().max().item()
    return gap / max(expected.float().abs().max().item(), torch.finfo(torch.float32).tiny)


def train(model: nn.Module, inputs: dict[str, Any], loss: Callable[[Any], torch.Tensor], steps: int) -> list[float]:
    """Train every trainable parameter with Adam on one batch; return the loss before each step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(**inputs))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Require that the block raises one of lora_adapters.errors, with a message."""
    caught: LoraAdaptersError | None = None
    try:
        yield
    except LoraAdaptersError as error:
        caught = error
    assert caught is not None, f"{what} should raise one of lora_adapters.errors, and was accepted."
    assert str(caught), f"{what} is refused without a message."
