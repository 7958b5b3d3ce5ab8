"""An oracle for the layouts of fused qkv projections that knows none of them.

The projection's output is replaced by noise, one row of it is pushed at one token, and what reaches the output projection
(else the attention's own output) is watched. Whatever kind of attention it is,

- values go in linearly: the effects of pushing a row up and down cancel; keys do not, and softmax's queries neither;
- a key has a say in more of the output than a query: softmax(q k^T) v mixes over all keys, a query is one row of it.
  (Attention over tokens: a query row reaches one token, a key row all. Attention over channels: a query row reaches one
  channel, a key row all of its head.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from lora_adapters_timm.attention import projections
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Rows = tuple[tuple[int, int], ...]

#: Classes whose own names say something else than the rules do: their q, k, v act as the roles given here.
RENAMED: Mapping[str, Mapping[str, str]] = {
    # DaViT: softmax(k^T v) q^T, so what it calls keys asks, and what it calls queries is mixed.
    "ChannelAttention": {"q": "v", "k": "q", "v": "k"},
    # MobileViT v2: softmax(q) weighs the tokens of k, a linear sum, which gates relu(v).
    "LinearSelfAttention": {"q": "k", "k": "v", "v": "q"},
}
#: Values pass a normalisation, so they do not go in linearly: q and k are told apart, and what remains is v.
NORMALISED_VALUES = ("MultiScaleAttention", "DiffAttention", "DiffParallelScalingBlock")


@dataclass(frozen=True)
class Effect:
    """What pushing a row did: whether up and down cancel, and what part of the output changed."""

    linear: bool
    breadth: float


class _Replace(TorchFunctionMode):
    """Puts `noise` in the place of what the layer with this weight computes, also where the weight is read directly."""

    def __init__(self, weight: torch.Tensor, noise: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.noise = weight, noise
        self.made: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        if weight is self.weight and func in (F.linear, F.conv2d):
            self.made = out = out if self.noise is None else self.noise.clone()
        return out


class Attention:
    """One attention of a model, ready to be pushed at.

    Args:
        model: a timm model with weights on the CPU, in eval mode.
        image: what to call it with, once, to see what the attention is given.
        name: the fused projection.
    """

    def __init__(self, model: nn.Module, image: torch.Tensor, name: str) -> None:
        owner_name = name
        while not projections(model.get_submodule(owner_name)):
            owner_name = owner_name.rpartition(".")[0]
        found: list[Any] = []
        owner = model.get_submodule(owner_name)
        hook = owner.register_forward_pre_hook(
            lambda _, a, k: found.append((a, k)) if not found else None, with_kwargs=True
        )
        with torch.no_grad():
            model(image)
        hook.remove()
        self.owner = copy.deepcopy(owner).double()
        self.owner.eval()  # LeViT's returns None
        self.args, self.kwargs = (_double(part) for part in found[0])
        self.kind = type(owner).__name__
        layer = self.owner.get_submodule(name[len(owner_name) + 1 :])
        self.weight = layer.weight
        self.seen: list[torch.Tensor] = []
        outputs = [child for child, role in projections(self.owner).items() if role == "o"]
        if outputs:
            self.owner.get_submodule(outputs[0]).register_forward_pre_hook(lambda _, a: self.seen.append(a[0].clone()))
        self.convolution = isinstance(layer, nn.Conv2d)
        # EfficientViT's heads each have a projection, and pass what they find on to the next one.
        place = name[len(owner_name) + 1 :].split(".")
        self.head = (int(place[1]), len(self.owner.qkvs)) if place[0] == "qkvs" else (0, 1)
        made = self._run(None)[1]
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(made.shape, generator=generator, dtype=torch.float64)
        self.base = self._run(self.noise)[0]

    @property
    def tokens(self) -> int:
        """How many tokens the projection is given."""
        return self.noise.numel() // self.weight.shape[0]

    def _run(self, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.clear()
        with torch.no_grad(), _Replace(self.weight, noise) as mode:
            out = self.owner(*_clone(self.args), **_clone(self.kwargs))
        assert mode.made is not None, "the projection was not used"
        head, heads = self.head
        return (self.seen[0] if self.seen else out).chunk(heads, dim=1)[head], mode.made

    def push(self, row: int, amount: float = 2.0) -> Effect:
        """Push a row at the first token (a corner, where convolutions around the attention reach least), up and down."""
        changes = []
        for sign in (1, -1):
            noise = self.noise.clone()
            if self.convolution:
                noise[0, row, 0, 0] += sign * amount
            else:
                noise.view(-1, noise.shape[-1])[0, row] += sign * amount
            changes.append(self._run(noise)[0] - self.base)
        up, down = changes
        size = up.abs().max().item()
        # Whatever is computed in fp32 inside has its rounding in the difference.
        linear = (up + down).abs().max().item() <= 1e-4 * size
        return Effect(linear, (up.abs() > 1e-6 * size).double().mean().item() if size else 0.0)


def _double(tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


def _clone(tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, tree)


def check_layout(model: nn.Module, image: torch.Tensor, name: str, parts: Mapping[str, Rows]) -> str:
    """Return "" if a projection's rows do what their parts say, else what they do instead.

    Raises:
        NotApplicableError: too few tokens to tell a query from a key.
    """
    attention = Attention(model, image, name)
    if attention.tokens < 2:
        raise NotApplicableError(f"{name} sees one token")
    renamed = RENAMED.get(attention.kind, {})
    effects = {renamed.get(role, role): [attention.push(r) for r in _sample(rows)] for role, rows in parts.items()}
    if "v" in effects and attention.kind not in NORMALISED_VALUES and not all(e.linear for e in effects["v"]):
        return "values do not go in linearly"
    if "k" in effects and any(e.linear and e.breadth for e in effects["k"]):
        return "keys go in linearly, as values do"
    if not any(e.breadth for role in "qk" for e in effects.get(role, ())):
        raise NotApplicableError(f"neither queries nor keys of {name} reach the output of one image")
    if "q" in effects and "k" in effects:
        query, key = (max(e.breadth for e in effects[role]) for role in "qk")
        if not query * 1.2 < min(e.breadth for e in effects["k"] if e.breadth) <= key:
            return f"a query reaches {query:.3g} of the output, a key {key:.3g}"
    covered = sorted(row for rows in parts.values() for row in rows)
    if any(end != start for (_, end), (start, _) in pairwise(covered)):
        return "the parts leave rows out between them"
    return ""


def _sample(rows: Rows) -> Iterator[int]:
    """Yield the first, the last and a middle row of the first, the last and a middle range."""
    for start, end in sorted({rows[0], rows[len(rows) // 2], rows[-1]}):
        yield from sorted({start, (start + end) // 2, end - 1})


class NotApplicableError(Exception):
    """This attention can't be judged on this image."""
