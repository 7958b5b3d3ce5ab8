"""An adapter folded into the weights of a checkpoint: which tensors change, and how. Nothing is read or written here."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import __version__
from ..adapter_file import VERSION_ENTRY
from ..errors import CheckpointError, UnsupportedError
from ..tensor_file import FLOATING, TensorInfo
from ..tensor_stream import Change
from .checkpoint_layers import Layer, Slot
from .factors import Factors, LoraFactors
from .portable import PortableAdapter

#: Header's entry: a JSON list of what was merged.
MERGED_ENTRY = "lora_adapters.merged"
#: Entries that are about the very bytes of a file.
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
#: Ends of the keys that quantized checkpoints have beside a weight.
_QUANTIZED = (".absmax", ".quant_map", ".scale_weight", ".weight_scale", "scaled_fp8", ".SCB")


def folded(weight: Tensor, factors: Factors, scale: float = 1.0) -> Tensor:
    """Return the weight of a layer with its adapter folded in.

    W' = W + scale * update; with a magnitude m (DoRA, arXiv:2402.09353, as PEFT computes it) W' = m (W + scale * update) /
    norm(W + scale * update), the norm being over all but the outputs, or all but the inputs.

    Args:
        weight: (out, in, *kernel), float64.
        factors: of the same shape, or of the flattened one.
        scale: factor of the update.
    """
    merged = torch.add(weight, factors.update().reshape(weight.shape), alpha=scale)
    if factors.magnitude is None:
        return merged
    axis = 0 if factors.magnitude_axis == "output" else 1
    others = [dim for dim in range(weight.dim()) if dim != axis]
    norm = torch.linalg.vector_norm(merged, dim=others, keepdim=True)
    return merged * (factors.magnitude.double().reshape(norm.shape) / norm)


@dataclass(frozen=True)
class _Weight:
    """Changes a tensor that holds the weights of some adapted layers."""

    parts: tuple[tuple[Slot, Factors], ...]
    scale: float

    def __call__(self, tensor: Tensor) -> Tensor:
        for slot, factors in self.parts:
            rows = slot.rows(tensor)
            new = folded(slot.turned(rows).reshape(slot.shape), factors, self.scale)
            rows.copy_(slot.turned(new).reshape(rows.shape))
        return tensor


@dataclass(frozen=True)
class _Bias:
    """Changes a tensor that holds the biases of some layers whose adapters have a bias (PEFT's lora_bias)."""

    parts: tuple[tuple[Slot, LoraFactors], ...]
    scale: float

    def __call__(self, tensor: Tensor) -> Tensor:
        for slot, factors in self.parts:
            assert factors.bias is not None
            rows = slot.rows(tensor)
            rows += slot.turned(self.scale * factors.scaling * factors.bias.double())
        return tensor


def changes(
    adapter: PortableAdapter,
    slots: Mapping[Layer, Slot],
    tensors: Mapping[str, TensorInfo],
    scale: float,
    origin: str,
) -> dict[str, Change]:
    """Return key -> how its tensor changes.

    Args:
        adapter: what to fold in.
        slots: where the checkpoint's layers are.
        tensors: the checkpoint's tensors.
        scale: factor of every update.
        origin: the checkpoint, for messages.

    Raises:
        CheckpointError: the checkpoint lacks layers of the adapter, or has them in another size.
        UnsupportedError: the checkpoint is quantized, or a layer has no bias and its adapter has one.
    """
    _check_there(adapter, slots, origin)
    _check_dense(tensors, origin)
    weights: dict[str, list[tuple[Slot, Factors]]] = defaultdict(list)
    biases: dict[str, list[tuple[Slot, LoraFactors]]] = defaultdict(list)
    for component, module, factors in adapter:
        slot = slots[component, module]
        _check_fits(f"{module!r} of the {component}", slot, factors, origin)
        if tensors[slot.weight].dtype not in FLOATING:
            raise UnsupportedError(
                f"{origin} stores {slot.weight!r} as {tensors[slot.weight].dtype}, in which an update would be lost to "
                "rounding. Give a checkpoint of 16 or 32 bits."
            )
        weights[slot.weight].append((slot, factors))
        if isinstance(factors, LoraFactors) and factors.bias is not None:
            if slot.bias not in tensors:
                raise UnsupportedError(
                    f"The adapter of {module!r} has a bias, and this layer of {origin} has none to add it to."
                )
            biases[slot.bias].append((slot, factors))
    made: dict[str, Change] = {key: _Weight(tuple(parts), scale) for key, parts in weights.items()}
    return made | {key: _Bias(tuple(parts), scale) for key, parts in biases.items()}


def _check_there(adapter: PortableAdapter, slots: Mapping[Layer, Slot], origin: str) -> None:
    lost = [(component, module) for component, module, _ in adapter if (component, module) not in slots]
    if lost:
        named = ", ".join(f"{module!r} of the {component}" for component, module in lost[:3])
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        family = f" (it is for {adapter.family})" if adapter.family else ""
        raise CheckpointError(
            f"The adapter was made for another model{family}: {origin} lacks {len(lost)} of its {len(adapter)} layers, "
            f"{named}{more}. Give the checkpoint that it was trained on."
        )


def _check_dense(tensors: Mapping[str, TensorInfo], origin: str) -> None:
    if found := next((key for key in tensors if key.endswith(_QUANTIZED) or ".quant_state." in key), None):
        raise UnsupportedError(
            f"{origin} is quantized (it holds {found!r}), and merging rounds to what it stores. Give the checkpoint of 16 "
            "or 32 bits, and quantize the merged one."
        )


def _check_fits(name: str, slot: Slot, factors: Factors, origin: str) -> None:
    mine, there = factors.shape, slot.shape
    flattened = all(side == 1 for side in mine[2:]) and mine[:2] == (there[0], math.prod(there[1:]))
    axis = 0 if factors.magnitude_axis == "output" else 1
    long = factors.magnitude is None or factors.magnitude.numel() == there[axis]
    if not (mine == there or flattened) or not long:
        raise CheckpointError(
            f"The adapter was made for another model: its {name} is {list(mine)}, and that of {origin} is {list(there)}."
        )


def merged_metadata(old: Mapping[str, str], adapter: str, scale: float, layers: int) -> dict[str, str]:
    """Return the header's entries of a merged file: the old ones, less hashes of the old file, and what was merged."""
    kept = {key: value for key, value in old.items() if key not in _HASHES}
    try:
        before = json.loads(old.get(MERGED_ENTRY, "[]"))
    except ValueError:
        before = []
    merged = [*(before if isinstance(before, list) else []), {"adapter": adapter, "scale": scale, "layers": layers}]
    return {"format": "pt", **kept, MERGED_ENTRY: json.dumps(merged), VERSION_ENTRY: __version__}
