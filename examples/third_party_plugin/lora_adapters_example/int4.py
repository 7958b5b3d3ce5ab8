"""The quantizer "int4-rows": 4-bit integers, two in a byte, and one 16-bit scale for each row of a linear weight.

w is stored as q * scale with q in -7..7 and scale = max |row| / 7, rounded to bfloat16. The error is at most half a
step, 1/14 of the row's largest |w|, and what rounding the scale adds (1/256 of it).
"""

import torch
import torch.nn.functional as F
from torch import nn

from lora_adapters.errors import RequestError
from lora_adapters.weights import why_not_plain
from lora_adapters.weights.dense import carry_settings, check_shape, copy_bias


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (uint8 (out, ceil(in / 2)), scale (out,) as int16) of a weight (out, in)."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(1) / 7).bfloat16()
    steps = torch.where(scale > 0, scale, 1).float()[:, None]
    q = (weight / steps).round().clamp(-7, 7).to(torch.int8) + 7
    low, high = q[:, ::2], F.pad(q, (0, q.shape[1] % 2))[:, 1::2]
    return (low | high << 4).to(torch.uint8), scale.view(torch.int16)


def unpack(packed: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
    """Return the float32 weight (out, width)."""
    q = torch.stack((packed & 15, packed >> 4), 2).flatten(1)[:, :width].float() - 7
    return q * scale.view(torch.bfloat16).float()[:, None]


class DequantizedLinear(torch.autograd.Function):
    """y = x W^T. Backward unpacks W again, so that no dense weight is kept between forward and backward."""

    @staticmethod
    def forward(ctx, x, packed, scale):
        ctx.save_for_backward(packed, scale)
        ctx.width = x.shape[-1]
        return x @ unpack(packed, scale, ctx.width).to(x.dtype).t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ unpack(*ctx.saved_tensors, ctx.width).to(grad.dtype), None, None


class Int4Linear(nn.Linear):
    """A linear layer with a frozen 4-bit weight. The scales are kept as int16 bits: `.half()` must not touch them."""

    def __init__(self, in_features, out_features, bias, compute_dtype, packed, scale) -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = DequantizedLinear.apply(input, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int4Store:
    """See lora_adapters.weights.WeightStore."""

    format = "int4-rows"

    def __init__(self, module: Int4Linear) -> None:
        self.module = module

    @property
    def shape(self):
        return torch.Size((self.module.out_features, self.module.in_features))

    @property
    def dtype(self):
        return self.module.compute_dtype

    @property
    def device(self):
        return self.module.weight.device

    @property
    def nbytes(self):
        return self.module.weight.nbytes + self.module.scale.nbytes

    def read(self, dtype=None):
        return unpack(self.module.weight, self.module.scale, self.module.in_features).to(dtype or self.dtype)

    def write(self, weight):
        check_shape(weight, self.shape)
        packed, scale = pack(weight.to(self.device))
        self.module.weight.data.copy_(packed)
        self.module.scale.copy_(scale)

    def dense_module(self, weight):
        check_shape(weight, self.shape)
        new = nn.Linear(self.shape[1], self.shape[0], self.module.bias is not None, device="meta")
        new.weight = nn.Parameter(weight.detach(), requires_grad=False)
        carry_settings(self.module, new)
        copy_bias(self.module, new, weight.dtype)
        return new


class Int4Rows:
    """See lora_adapters.weights.Quantizer."""

    name = "int4-rows"

    def supports(self, module):
        return why_not_plain(module, ("linear",)) or ("" if type(module) is nn.Linear else "only nn.Linear is stored")

    def nbytes(self, shape):
        return shape[0] * ((shape[1] + 1) // 2) + 2 * shape[0]

    def quantize(self, module, compute_dtype):
        if reason := self.supports(module):
            raise RequestError(f"Can't quantize to {self.name}: {reason}.")
        sizes = (module.in_features, module.out_features, module.bias is not None)
        new = Int4Linear(*sizes, compute_dtype, *pack(module.weight))
        carry_settings(module, new)
        copy_bias(module, new)
        return new

    def store(self, module):
        return Int4Store(module) if isinstance(module, Int4Linear) else None
