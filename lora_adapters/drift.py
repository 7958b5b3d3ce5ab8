"""How far quantized weights move a model's output: in total, and for each part of the model quantized alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .backends import backend_for, classify, unwrap
from .errors import RequestError, UnsupportedError
from .quantized import quantizers_of
from .request import AttachRequest
from .targets import GROUPS, ModelInfo, candidates
from .weights import quantize_modules, store_for

if TYPE_CHECKING:
    from .weights import Quantizer

#: A list of at least this many blocks is cut into thirds, of a shorter one each block is a part.
_MANY_BLOCKS = 6


@dataclass(frozen=True)
class Drift:
    """What quantizing one part alone does.

    Attributes:
        part: its name.
        layers: how many layers of it are quantized.
        saved: bytes that this saves.
        error: |quantized - dense| / |dense| of the model's output, L2 norms over all values of all inputs.
        cosine: cosine of the two outputs.
    """

    part: str
    layers: int
    saved: int
    error: float
    cosine: float


@dataclass(frozen=True)
class DriftReport:
    """What quantizing a model costs in accuracy. `print` it for a table.

    Attributes:
        total: everything quantized that `quantization` names.
        parts: each part quantized alone, the largest error first. Errors of parts don't add up to the total's.
        inputs: how many inputs were run.
    """

    total: Drift
    parts: tuple[Drift, ...]
    inputs: int

    def __str__(self) -> str:
        """Return a table: part, layers, megabytes saved, relative error, cosine."""
        rows = [("quantized", "layers", "MB saved", "error", "cosine")]
        for drift in (self.total, *self.parts):
            numbers = (str(drift.layers), f"{drift.saved / 1e6:.1f}", f"{drift.error:.2%}", f"{drift.cosine:.5f}")
            rows.append((drift.part, *numbers))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))) for row in rows]
        return "\n".join((*lines, f"over {self.inputs} input{'s' if self.inputs > 1 else ''}"))


def measure_drift(
    model: nn.Module,
    quantization: Any = "nf4",
    *,
    by: str | Callable[[str], str] = "role",
    inputs: Iterable[Mapping[str, Any]] | None = None,
    output: Callable[[Any], torch.Tensor] | None = None,
) -> DriftReport:
    """Run a dense model, then the same model with its weights quantized, whole and part by part, and compare outputs.

    The model is not touched: twins of it, which share its tensors, are quantized. That takes the memory of the quantized
    layers on top of the model, and a forward of every input for the dense model, the total and each part.

    Args:
        model: a dense model without adapters, on any device but "meta".
        quantization: as for `lora_adapters.attach`.
        by: "role" (attention, mlp, conv, other), "block" (each block, or thirds where there are many), or a function from
            a layer's name to its part's.
        inputs: keyword arguments of the forward, one mapping for each input, in the model's dtype and on its device.
            None takes the backend's example, whose values are random: what the model will really see says more.
        output: gets the tensor to compare out of what the forward returns; by default the first floating tensor that is
            no scalar (logits, sample, last_hidden_state).

    Raises:
        RequestError: the model is quantized, carries adapters or offloading hooks, or an argument is wrong.
        UnsupportedError: nothing of it can be quantized, or its backend has no example.
    """
    base = unwrap(model)
    _check(base)
    quantizers = quantizers_of(base, quantization)
    if not quantizers:
        raise RequestError("The model is quantized already: drift is measured from the dense one.")
    parts: dict[str, dict[str, Quantizer]] = {}
    part_of = _part_names(base, by)
    for name, quantizer in quantizers.items():
        parts.setdefault(part_of(name), {})[name] = quantizer
    run = _Runs(base, _inputs(base) if inputs is None else list(inputs), output or _first_tensor)
    found = [run.drift(part, chosen) for part, chosen in parts.items()]
    found.sort(key=lambda drift: drift.error, reverse=True)
    return DriftReport(run.drift("everything", quantizers), tuple(found), len(run.inputs))


def _check(model: nn.Module) -> None:
    tensors = list(chain(model.parameters(), model.buffers()))
    if any(tensor.is_meta for tensor in tensors):
        raise RequestError("The model's weights are on the meta device, or offloaded: load them first.")
    if any("forward" in vars(module) for module in model.modules()):
        raise RequestError("The forward of a module was replaced (an offloading hook): take hooks off first.")


def _inputs(model: nn.Module) -> list[Mapping[str, Any]]:
    """Return the backend's example, or its examples where it has several of a kind (timesteps)."""
    backend, _ = backend_for(model)
    first = _first_parameter(model)
    example = backend.example_inputs(model, 1, 64, first.device)
    several = getattr(backend, "spread_inputs", lambda model, example: [example])(model, example)

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(first.dtype) if tensor.is_floating_point() else tensor

    return [tree_map_only(torch.Tensor, cast, each) for each in several]


def _first_parameter(model: nn.Module) -> nn.Parameter:
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point())


def _first_tensor(result: Any) -> torch.Tensor:
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim():
            return leaf
    raise UnsupportedError("The forward returns no floating tensor: say which to compare (output=).")


class _Runs:
    """A dense model's outputs for some inputs, and what quantized twins give instead."""

    def __init__(
        self, model: nn.Module, inputs: list[Mapping[str, Any]], output: Callable[[Any], torch.Tensor]
    ) -> None:
        if not inputs:
            raise RequestError("There is no input to run.")
        self.model, self.inputs, self.output = model, inputs, output
        self.dense = self._outputs(_twin(model))
        if not all(values.isfinite().all() for values in self.dense):
            raise RequestError(
                "The dense model's output is not finite for these inputs: there is nothing to compare with."
            )

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[torch.Tensor]:
        return [self.output(model(**each)).float().cpu() for each in self.inputs]

    def drift(self, part: str, quantizers: Mapping[str, Quantizer]) -> Drift:
        """Return what quantizing these layers does."""
        twin = _twin(self.model)
        before = _bytes(twin, quantizers)
        quantize_modules(twin, quantizers, _first_parameter(twin).dtype)
        saved = before - _bytes(twin, quantizers)
        distance = dense = packed = product = 0.0
        for mine, theirs in zip(self.dense, self._outputs(twin), strict=True):
            distance += (theirs - mine).double().square().sum().item()
            dense += mine.double().square().sum().item()
            packed += theirs.double().square().sum().item()
            product += (mine.double() * theirs).sum().item()
        lengths = math.sqrt(dense * packed)
        error = math.sqrt(distance / dense) if dense else math.inf if distance else 0.0
        cosine = product / lengths if lengths else 1.0 if dense == packed else 0.0
        return Drift(part, len(quantizers), saved, error, cosine)


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode that shares the model's tensors."""
    return copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())}).eval()


def _bytes(model: nn.Module, names: Iterable[str]) -> int:
    stores = {id(module): store_for(module) for module in map(model.get_submodule, names)}
    return sum(store.nbytes for store in stores.values() if store is not None)


def _part_names(model: nn.Module, by: str | Callable[[str], str]) -> Callable[[str], str]:
    if callable(by):
        return by
    if by == "role":
        return _roles(model)
    if by == "block":
        return lambda name: _block(model, name)
    raise RequestError(f"by must be 'role', 'block' or a function from a layer's name to its part, got {by!r}.")


def _roles(model: nn.Module) -> Callable[[str], str]:
    backend, _ = backend_for(model)
    info = ModelInfo(backend.name, backend.family(model), candidates(model), model)
    roles = classify(backend, info, AttachRequest.make()).roles

    def part(name: str) -> str:
        role = roles.get(name, "other")
        return "attention" if role in GROUPS["attention"] else role

    return part


def _block(model: nn.Module, name: str) -> str:
    """Return the block that a layer is in: the outermost, or a third of a long list of blocks."""
    words = name.split(".")
    for count in range(1, len(words)):
        path = ".".join(words[:count])
        outer = model.get_submodule(path)
        if "Block" in type(outer).__name__:  # one in no list, such as a UNet's mid_block
            return path
        if isinstance(outer, nn.ModuleList) and words[count].isdigit():
            index, blocks = int(words[count]), len(outer)
            if blocks < _MANY_BLOCKS:
                return f"{path}.{index}"
            third = 3 * index // blocks
            members = [i for i in range(blocks) if 3 * i // blocks == third]
            return f"{path}.{members[0]}-{members[-1]}"
    return words[0]
