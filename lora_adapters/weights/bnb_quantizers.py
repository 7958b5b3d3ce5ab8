"""The quantizers over bitsandbytes: NF4 and FP4 for linear layers and convolutions, INT8 for linear layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import RequestError
from . import primitives
from .bnb import bnb_store
from .conv4bit import Conv1d4bit, Conv2d4bit
from .conv4bit_own import OwnForwardConv1d4bit, OwnForwardConv2d4bit
from .dense import DenseStore, carry_settings, copy_bias, has_own_forward, layer_kind, why_not_plain
from .store import WeightStore


@dataclass(unsafe_hash=True)
class Bnb4bit:
    """Stores linear and convolution weights in 4 bits: bitsandbytes' Linear4bit, our Conv1d4bit and Conv2d4bit.

    Linear layers whose in_features is no multiple of the block size become our subclass of Linear4bit, which is right
    on CPUs where bitsandbytes is not.

    The weight is quantized in the dtype it has, as transformers does it.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: values that share one maximum.
        nested: whether the maxima are quantized too.
        quant_storage: dtype the packed bytes of a linear layer are shown as; FSDP wants the model's float dtype.
        compute_dtype: overrides the argument of `quantize` (a BitsAndBytesConfig says it).
        skip: names of modules that a BitsAndBytesConfig says must stay dense; for the caller to respect.
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    nested: bool = True
    quant_storage: torch.dtype = torch.uint8
    compute_dtype: torch.dtype | None = None
    skip: tuple[str, ...] = ()
    name: str = field(init=False, default="nf4")

    def __post_init__(self) -> None:
        primitives.check_settings(self.quant_type, self.blocksize)
        self.name = self.quant_type

    def supports(self, module: nn.Module) -> str:
        """Return "" or why this module can't be stored in 4 bits."""
        convolution = isinstance(module, (nn.Conv1d, nn.Conv2d))
        if reason := why_not_plain(module, ("linear", "conv1d", "conv2d"), own_forward=convolution):
            return reason
        dtype = DenseStore(module).dtype
        if dtype not in primitives.FLOATS:
            return f"its weight is {dtype}; 4-bit quantization takes fp32, bf16 and fp16"
        packed = (DenseStore(module).shape.numel() + 1) // 2
        if layer_kind(module) == "linear" and packed % self.quant_storage.itemsize:
            return f"its {packed} packed bytes can't be stored as {self.quant_storage}"
        return ""

    def nbytes(self, shape: torch.Size) -> int:
        """Return the exact bytes of a weight of this shape, statistics and code tables included."""
        return primitives.nbytes(torch.Size(shape).numel(), self.blocksize, self.nested)

    def quantize(self, module: nn.Module, compute_dtype: torch.dtype) -> nn.Module:
        """Return a Linear4bit or a 4-bit convolution with this module's weight and a copy of its bias.

        Raises:
            RequestError: the module can't be quantized.
            MissingDependencyError: bitsandbytes is not installed.
        """
        if reason := self.supports(module):
            raise RequestError(f"Can't quantize to {self.name}: {reason}.")
        compute_dtype = self.compute_dtype or compute_dtype
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            one = isinstance(module, nn.Conv1d)
            if has_own_forward(module):
                conv = OwnForwardConv1d4bit if one else OwnForwardConv2d4bit
            else:
                conv = Conv1d4bit if one else Conv2d4bit
            return conv.from_dense(module, self.quant_type, self.blocksize, self.nested, compute_dtype)
        return self._linear(module, compute_dtype)

    def _linear(self, module: nn.Module, compute_dtype: torch.dtype) -> nn.Module:
        store, classes = DenseStore(module), primitives.bitsandbytes().nn
        weight = store.logical
        settings: dict[str, Any] = {
            "compress_statistics": self.nested,
            "quant_type": self.quant_type,
            "quant_storage": self.quant_storage,
        }
        from .linear4bit import Linear4bit, is_mishandled

        make: Any = Linear4bit if is_mishandled(store.shape[1], self.blocksize) else classes.Linear4bit
        new = make(
            *reversed(store.shape),
            bias=module.bias is not None,
            compute_dtype=compute_dtype,
            **settings,
            device="meta",
        )
        format_ = (self.quant_type, self.blocksize, self.nested)
        if weight.device.type == "meta":
            state = primitives.empty_state(store.shape, weight.dtype, *format_, weight.device)
            count = (store.shape.numel() + 1) // 2 // self.quant_storage.itemsize
            packed = torch.empty(count, 1, dtype=self.quant_storage, device="meta")
        else:
            packed, state = primitives.quantize(weight, *format_, self.quant_storage)
        new.weight = classes.Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=self.blocksize, bnb_quantized=True, **settings
        )
        new.quant_state = state
        new.support_avx512bf16_for_cpu = False  # see guard_cpu_repacking
        carry_settings(module, new)
        copy_bias(module, new)
        return new

    def store(self, module: nn.Module) -> WeightStore | None:
        """Return the store of a module in this quantizer's format (nf4 or fp4, any block size), else None."""
        store = bnb_store(module)
        return store if store is not None and store.format == self.name else None


class Nf4(Bnb4bit):
    """What "nf4" by name means: block 64, nested statistics."""


@dataclass(unsafe_hash=True)
class Fp4(Bnb4bit):
    """What "fp4" by name means: block 64, nested statistics."""

    quant_type: str = "fp4"


@dataclass(unsafe_hash=True)
class Int8:
    """Stores linear weights in 8 bits, one scale a row: bitsandbytes' Linear8bitLt. No convolutions.

    On the CPU (bitsandbytes 0.50): training dequantizes and is exact. Eval quantizes the input too, through fp16, so
    its output differs from training's by 1 to 2 %; eval raises for inputs with more than 3 dimensions (Swin), and both
    modes for inputs with 1. Gradients reach the input in both modes.

    Attributes:
        threshold: inputs with a value above it are computed in fp16 column by column in eval; 0 switches that off.
        skip: names of modules that a BitsAndBytesConfig says must stay dense; for the caller to respect.
        largest: the largest magnitude a weight may have.
    """

    threshold: float = 6.0
    skip: tuple[str, ...] = ()
    name: str = field(init=False, default="int8")
    largest: float = field(init=False, default=primitives.FP16_MAX)

    def supports(self, module: nn.Module) -> str:
        """Return "" or why this module can't be stored in 8 bits."""
        return why_not_plain(module, ("linear",))

    def nbytes(self, shape: torch.Size) -> int:
        """Return the exact bytes of an (out, in) weight: one byte a value and one fp32 scale a row."""
        return shape[0] * shape[1] + 4 * shape[0]

    def quantize(self, module: nn.Module, compute_dtype: torch.dtype) -> nn.Module:
        """Return a Linear8bitLt with this module's weight and a copy of its bias.

        Raises:
            RequestError: the module can't be quantized, or its weight is not finite in fp16.
            MissingDependencyError: bitsandbytes is not installed.
        """
        if reason := self.supports(module):
            raise RequestError(f"Can't quantize to int8: {reason}.")
        store, classes = DenseStore(module), primitives.bitsandbytes().nn
        new: Any = classes.Linear8bitLt(
            *reversed(store.shape),
            bias=module.bias is not None,
            has_fp16_weights=False,
            threshold=self.threshold,
            device="meta",
        )
        if store.device.type == "meta":
            values = torch.empty(store.shape, dtype=torch.int8, device="meta")
            scales = torch.empty(store.shape[0], device="meta")
        else:
            values, scales = primitives.quantize_rows(store.logical)
        new.weight = classes.Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
        new.compute_dtype = compute_dtype
        carry_settings(module, new)
        copy_bias(module, new)
        return new

    def store(self, module: nn.Module) -> WeightStore | None:
        """Return the store of a quantized Linear8bitLt, else None."""
        store = bnb_store(module)
        return store if store is not None and store.format == "int8" else None
