"""The stores of bitsandbytes' linear layers, and the mending of what bitsandbytes does to them on CPUs."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import torch
from torch import nn

from ..errors import LoraAdaptersWarning, UnsupportedError
from . import primitives
from .conv4bit import Conv4bit, Conv4bitStore
from .dense import carry_settings, check_shape, copy_bias
from .store import WeightStore


def _is_bnb(module: nn.Module, name: str) -> bool:
    """True if the module is a bitsandbytes class of this name or a subclass; imports nothing."""
    return _is_bnb_class(type(module), name)


@functools.cache
def _is_bnb_class(module_class: type, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith("bitsandbytes") for c in module_class.__mro__)


def _dense_linear(module: Any, weight: torch.Tensor) -> nn.Linear:
    """Return an nn.Linear with this weight, frozen, and a copy of the module's bias in the weight's dtype."""
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
    new.weight = nn.Parameter(weight.detach(), requires_grad=False)
    carry_settings(module, new)
    copy_bias(module, new, weight.dtype)
    return new


def _is_repacked(module: nn.Module) -> bool:
    return bool(getattr(_state(module), "packing_format_for_cpu", False))


def _unrepacked(packed: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """Return a repacked weight and its state in the ordinary layout; the arguments stay as they are.

    The 4-bit values come back exactly. The block maxima don't: repacking rounded them to bf16 (2^-9 relative), and
    nested ones are quantized again. bitsandbytes' own inverse leaves the maxima of a weight that is not nested
    transposed, and those of a nested one in the wrong dtype, so only its values are used.
    """
    package = primitives.bitsandbytes()
    inverse = getattr(package.nn.modules, "_convert_weight_packed_for_cpu_inverse", None)
    if inverse is None:
        raise UnsupportedError(
            "A 4-bit layer was repacked by a forward in eval mode on the CPU, and this version of bitsandbytes has no "
            "way back. Load the model again and call guard_cpu_repacking(model) before the first forward."
        )
    scratch, restored = copy.copy(state), copy.copy(state)
    scratch.original_nested = False
    values, _ = inverse(packed.detach(), scratch)
    restored.packing_format_for_cpu = False
    restored.dtype = state.original_dtype
    restored.absmax = state.absmax.t().reshape(-1).float()
    restored.state2, restored.nested = None, False
    if state.original_nested:
        restored.offset = restored.absmax.mean()
        restored.absmax, restored.state2 = package.functional.quantize_blockwise(
            restored.absmax - restored.offset, blocksize=primitives.NESTED_BLOCKSIZE
        )
        restored.nested = True
    return values, restored


def guard_cpu_repacking(model: nn.Module) -> int:
    """Make every Linear4bit of a model compute and differentiate rightly on the CPU, adapted or not. In place.

    Two things go wrong without it. On CPUs with AVX512-BF16 a forward in eval mode without gradients repacks the weight
    for a faster kernel: after that the input's gradient is None even in train mode and dequantization returns wrong
    values; the repacking itself raises where in_features is no multiple of the block size or out_features none of 32.
    So repacking is switched off, and undone where it has happened. And on CPUs with AVX512 a layer whose in_features is
    no multiple of the block size (96, with 64) computes with wrong weights in both modes: it becomes a
    `linear4bit.Linear4bit`. Moving or copying the model keeps both.

    Returns:
        The number of Linear4bit layers in the model.

    Raises:
        UnsupportedError: a layer has been repacked and this version of bitsandbytes can't undo it.
    """
    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if _is_bnb(m, "Linear4bit")]
    for _, layer in layers:
        layer.support_avx512bf16_for_cpu = False
    for name, layer in layers:
        _undo_repacking(layer)
        from .linear4bit import mend

        if not mend(layer):
            warnings.warn(
                f"{name} is a {type(layer).__name__} with in_features {layer.in_features}: bitsandbytes gives wrong "
                "results on CPUs with AVX512 for this size. It is not of bitsandbytes' own class, so it stays.",
                LoraAdaptersWarning,
                stacklevel=2,
            )
    return len(layers)


def _undo_repacking(layer: Any) -> None:
    """Give a repacked weight its ordinary layout, and a state left half-converted by a repacking that raised, sense."""
    state = _state(layer)
    if _is_repacked(layer):
        layer.weight.data, state = _unrepacked(layer.weight.data, state)
        layer.weight.quant_state = layer.quant_state = state
    elif state is not None and "state2" not in vars(state):
        # The nested maxima have been unpacked to fp32 and their state deleted: it is a state without nesting now.
        state.state2 = None


def _state(module: Any) -> Any:
    """Return the quantization state of a Linear4bit, None if it has not been quantized yet."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


class Linear4bitStore:
    """The store of a bitsandbytes Linear4bit, however it was made: any block size, nested or not, any quant_storage."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._layer: Any = module
        self.format = _state(module).quant_type

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return torch.Size((self._layer.out_features, self._layer.in_features))

    @property
    def dtype(self) -> torch.dtype:
        """The layer's compute dtype; until bitsandbytes has set one, the dtype the weight was quantized from."""
        return self._layer.compute_dtype or _state(self.module).dtype

    @property
    def device(self) -> torch.device:
        """Device of the packed weight."""
        return self._layer.weight.device

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and its statistics."""
        return self._layer.weight.nbytes + sum(t.nbytes for t in primitives.state_tensors(_state(self.module)).values())

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the dequantized weight."""
        packed, state = self._layer.weight.data, _state(self.module)
        if _is_repacked(self.module):
            packed, state = _unrepacked(packed, state)
        return primitives.dequantize(packed, state, self.shape, dtype or self.dtype)

    @torch.no_grad()
    def write(self, weight: torch.Tensor) -> None:
        """Quantize a dense weight in the layer's own format, in place.

        Raises:
            RequestError: the shape differs.
        """
        check_shape(weight, self.shape)
        if _is_repacked(self.module):
            _undo_repacking(self._layer)
        state, stored = _state(self.module), self._layer.weight.data
        values = weight.to(self.device)
        packed, new = primitives.quantize(values, state.quant_type, state.blocksize, state.nested, stored.dtype)
        stored.copy_(packed.view(stored.shape))
        old_tensors, new_tensors = primitives.state_tensors(state), primitives.state_tensors(new)
        for name, tensor in old_tensors.items():
            tensor.copy_(new_tensors[name].reshape(tensor.shape))
        # deepcopy leaves the module with a second state of its own.
        self._layer.weight.quant_state = self._layer.quant_state = state

    def dense_module(self, weight: torch.Tensor) -> nn.Module:
        """Return an nn.Linear with this weight, frozen, and a copy of the bias in the weight's dtype."""
        check_shape(weight, self.shape)
        return _dense_linear(self.module, weight)


class Linear8bitStore:
    """The store of a bitsandbytes Linear8bitLt that holds int8 weights (one fp32 scale a row)."""

    def __init__(self, module: nn.Module) -> None:
        self.format = "int8"
        self.module = module
        self._layer: Any = module

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self._layer.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype our quantizer noted, else the bias's dtype, else fp16. (The layer follows its input.)"""
        noted = getattr(self._layer, "compute_dtype", None)
        bias = self._layer.bias
        return noted or (torch.float16 if bias is None else bias.dtype)

    @property
    def device(self) -> torch.device:
        """Device of the int8 weight."""
        return self._layer.weight.device

    @property
    def _scales(self) -> torch.Tensor:
        """The rows' maxima (out,), fp32: on the parameter until the first forward, then on the layer's state."""
        scales = getattr(self._layer.weight, "SCB", None)
        return self._layer.state.SCB if scales is None else scales

    @property
    def nbytes(self) -> int:
        """Bytes of the int8 weight and its scales."""
        return self._layer.weight.numel() + self._scales.numel() * self._scales.element_size()

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the dequantized weight: int8 * scale / 127 in fp32, rounded once."""
        functional = primitives.bitsandbytes().functional
        values = functional.int8_vectorwise_dequant(self._layer.weight.detach().as_subclass(torch.Tensor), self._scales)
        return values.to(dtype or self.dtype)

    @torch.no_grad()
    def write(self, weight: torch.Tensor) -> None:
        """Quantize a dense weight row by row, in place. bitsandbytes quantizes through fp16.

        Raises:
            RequestError: the shape differs, or fp16 can't hold the values.
        """
        check_shape(weight, self.shape)
        values, scales = primitives.quantize_rows(weight.to(self.device))
        layer = self._layer
        # One tensor under up to three names, or copies of it after a move or a deepcopy.
        for target in (layer.weight.data, layer.weight.CB, layer.state.CB):
            if target is not None:
                target.copy_(values)
        for target in (layer.weight.SCB, layer.state.SCB):
            if target is not None:
                target.copy_(scales)

    def dense_module(self, weight: torch.Tensor) -> nn.Module:
        """Return an nn.Linear with this weight, frozen, and a copy of the bias in the weight's dtype."""
        check_shape(weight, self.shape)
        return _dense_linear(self.module, weight)


def bnb_store(module: nn.Module) -> WeightStore | None:
    """Return the store of a quantized Linear4bit, Linear8bitLt, Conv1d4bit or Conv2d4bit, None for anything else."""
    if isinstance(module, Conv4bit):
        return Conv4bitStore(module)
    if _is_bnb(module, "Linear4bit"):
        state = _state(module)
        layer: Any = module
        known = state is not None and tuple(state.shape or ()) == (layer.out_features, layer.in_features)
        return Linear4bitStore(module) if known else None
    if _is_bnb(module, "Linear8bitLt"):
        layer = module
        scales = getattr(layer.weight, "SCB", None)
        known = layer.weight.dtype == torch.int8 and (scales is not None or layer.state.SCB is not None)
        return Linear8bitStore(module) if known else None
    return None
