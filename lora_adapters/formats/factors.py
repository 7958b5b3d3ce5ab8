"""The numbers of one adapted layer, as files hold them: LoRA, LoHa or LoKr, each with the update it means.

An update is added to the base weight W, (out, in) of a linear layer or (out, in, *kernel) of a convolution:

    LoRA    scaling * B A                            Hu et al. 2021, arXiv:2106.09685; Tucker: B (mid x A)
    LoHa    scaling * (W1a W1b) * (W2a W2b)          Hyeon-Woo et al. 2022, arXiv:2108.06098
    LoKr    scaling * kron(W1, W2)                   Yeh et al. 2024, arXiv:2309.14859

with scaling = alpha / rank, or alpha / sqrt(rank) of rank-stabilised LoRA. A magnitude (DoRA, arXiv:2402.09353) replaces the
norm of W + update by its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What the three kinds have in common.

    Attributes:
        alpha: exactly what the file says; the rank where it says nothing.
        magnitude: DoRA's, one-dimensional: a value for each output (or each input) of the layer. None without DoRA.
        magnitude_axis: "output" as in PEFT, or "input", which some versions of LyCORIS train and PEFT has no form for.
    """

    kind: ClassVar[str] = ""
    alpha: float
    magnitude: Tensor | None = None
    magnitude_axis: str = "output"

    @property
    def rank(self) -> int:
        """The rank that alpha is divided by."""
        raise NotImplementedError

    @property
    def scaling(self) -> float:
        """Factor of the update."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the update, which is that of the base weight."""
        raise NotImplementedError

    def update(self) -> Tensor:
        """Return the dense update in float64, by the formula above: slow and obvious, what everything is tested against."""
        raise NotImplementedError

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor, of those that are there."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True)
class LoraFactors(Factors):
    """LoRA of a linear layer or a convolution.

    Attributes:
        a: (rank, in), or (rank, in, *kernel); with `mid` (rank, in, 1, ...).
        b: (out, rank), or (out, rank, 1, ...).
        mid: the Tucker core of LyCORIS' LoCon, (rank, rank, *kernel), or None.
        bias: PEFT's lora_bias, (out,), or None.
        rank_stabilised: scaling is alpha / sqrt(rank).
    """

    kind: ClassVar[str] = "LoRA"
    a: Tensor
    b: Tensor
    mid: Tensor | None = None
    bias: Tensor | None = None
    rank_stabilised: bool = False

    @property
    def rank(self) -> int:  # noqa: D102
        return self.a.shape[0]

    @property
    def scaling(self) -> float:  # noqa: D102
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        kernel = self.a.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.b.shape[0], self.a.shape[1], *kernel)

    def update(self) -> Tensor:  # noqa: D102
        a, b = self.a.double(), self.b.double().flatten(1)
        if self.mid is not None:
            a = torch.einsum("mn...,ni->mi...", self.mid.double(), a.flatten(1))
        return self.scaling * (b @ a.flatten(1)).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class LohaFactors(Factors):
    """LoHa: the elementwise product of two low-rank matrices.

    Attributes:
        w1_a, w2_a: (out, rank); with t1 and t2 (rank, out).
        w1_b, w2_b: (rank, in), where in counts the kernel's places too; with t1 and t2 (rank, in).
        t1, t2: Tucker cores, (rank, rank, *kernel), both or neither.
        kernel: the convolution's kernel, which only t1 and t2 hold otherwise; () for a linear layer.
    """

    kind: ClassVar[str] = "LoHa"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:  # noqa: D102
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        if self.t1 is not None:
            return (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])
        return (self.w1_a.shape[0], self.w1_b.shape[1] // math.prod(self.kernel), *self.kernel)

    def update(self) -> Tensor:  # noqa: D102
        one = _half(self.w1_a, self.w1_b, self.t1)
        two = _half(self.w2_a, self.w2_b, self.t2)
        return (self.scaling * one * two).reshape(self.shape)


def _half(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    a, b = a.double(), b.double()
    return a @ b if core is None else torch.einsum("ij...,ip,jr->pr...", core.double(), a, b)


@dataclass(frozen=True, kw_only=True)
class LokrFactors(Factors):
    """LoKr: the Kronecker product of a small matrix and a larger one; each whole, or a product of two.

    Attributes:
        w1: (out1, in1), or None where w1_a (out1, rank) @ w1_b (rank, in1) is.
        w2: (out2, in2, *kernel), or None where w2_a (out2, rank) @ w2_b (rank, in2 * kernel) is; with t2 w2_a is
            (rank, out2) and w2_b (rank, in2).
        t2: Tucker core, (rank, rank, *kernel), or None.
        kernel: the convolution's kernel, which only w2 and t2 hold otherwise; () for a linear layer.

    The file's alpha counts only where a factor is a product; with both whole the scaling is 1, as in LyCORIS.
    """

    kind: ClassVar[str] = "LoKr"
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:  # noqa: D102
        for factor in (self.w2_b, self.w1_b):
            if factor is not None:
                return factor.shape[0]
        return 1

    @property
    def scaling(self) -> float:  # noqa: D102
        whole = self.w1 is not None and self.w2 is not None
        return 1.0 if whole else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        out1, in1 = self.first_shape
        out2, in2, *kernel = self.second_shape
        return (out1 * out2, in1 * in2, *kernel)

    @property
    def first_shape(self) -> tuple[int, int]:
        """(out1, in1)."""
        if self.w1 is not None:
            return self.w1.shape[0], self.w1.shape[1]
        assert self.w1_a is not None
        assert self.w1_b is not None
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def second_shape(self) -> tuple[int, ...]:
        """(out2, in2, *kernel)."""
        if self.w2 is not None:
            return tuple(self.w2.shape)
        assert self.w2_a is not None
        assert self.w2_b is not None
        if self.t2 is not None:
            return (self.w2_a.shape[1], self.w2_b.shape[1], *self.t2.shape[2:])
        return (self.w2_a.shape[0], self.w2_b.shape[1] // math.prod(self.kernel), *self.kernel)

    def update(self) -> Tensor:  # noqa: D102
        if self.w1 is not None:
            w1 = self.w1.double()
        else:
            assert self.w1_a is not None
            assert self.w1_b is not None
            w1 = self.w1_a.double() @ self.w1_b.double()
        if self.w2 is not None:
            w2 = self.w2.double()
        else:
            assert self.w2_a is not None
            assert self.w2_b is not None
            w2 = _half(self.w2_a, self.w2_b, self.t2).reshape(self.second_shape).contiguous()
        return self.scaling * torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - 2)), w2)
