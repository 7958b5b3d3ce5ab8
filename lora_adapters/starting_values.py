"""The values that A and B start from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from .attach_plan import PlannedLayer
from .layers.part_factors import mask_of


def fill_factors(a: torch.Tensor, b: torch.Tensor, planned: PlannedLayer, seed: int | None, init: bool | str) -> None:
    """Fill A and B in place, as PEFT does, from numbers that depend on the seed and the module's name alone.

    True: A from the uniform distribution U(-1/sqrt(fan_in), 1/sqrt(fan_in)), B zero (embeddings: A zero, B from the
    normal distribution). "gaussian": A normal with standard deviation 1/rank. False: B random as well (for tests).
    Each part of a layer adapted in parts starts as a layer of its own would. Numbers are drawn on the CPU in float32, so
    that they are the same on every device.

    Args:
        a: (rank, ...), as PEFT shapes it for the kind of layer.
        b: (out, rank, 1...), or (dim, rank) of an embedding.
        planned: the layer.
        seed: None takes torch's current seed.
        init: LoraConfig's init_lora_weights, one of those above.
    """
    seed = torch.initial_seed() if seed is None else seed
    with torch.no_grad():
        for start, layer in _as_own_layers(planned):
            ranks = slice(start, start + layer.rank)
            _fill(a[ranks], b[:, ranks], layer, seed, init)
        if planned.parts:
            b *= mask_of(planned.parts, b.shape[0], b.device).view(b.shape)


def _as_own_layers(planned: PlannedLayer) -> Iterator[tuple[int, PlannedLayer]]:
    """Yield each part of a layer as a layer of its own, and where its ranks begin; the layer itself if it has none."""
    if not planned.parts:
        yield 0, planned
    start = 0
    for part in planned.parts:
        yield start, replace(planned, name=f"{planned.name}.{part.role}", rank=part.rank)
        start += part.rank


def _fill(a: torch.Tensor, b: torch.Tensor, planned: PlannedLayer, seed: int, init: bool | str) -> None:
    digest = hashlib.blake2b(f"{seed}:{planned.name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def fill(tensor: torch.Tensor, kind: str, size: float) -> None:
        # Straight into the tensor where it already is float32 on the CPU, through a copy elsewhere.
        here = tensor.device.type == "cpu" and tensor.dtype == torch.float32
        draw = tensor if here else torch.empty(tensor.shape, dtype=torch.float32)
        draw.uniform_(-size, size, generator=generator) if kind == "uniform" else draw.normal_(
            0, size, generator=generator
        )
        if not here:
            tensor.copy_(draw)

    if planned.kind == "embedding":
        a.zero_()
        fill(b, "normal", 1.0)
        if init is False:
            fill(a, "normal", 1.0)
        return
    fan_in = math.prod(planned.shape[1:])
    if init == "gaussian":
        fill(a, "normal", 1 / planned.rank)
    else:
        fill(a, "uniform", 1 / math.sqrt(fan_in))
    if init is False:
        fill(b, "uniform", 1 / math.sqrt(planned.rank))
