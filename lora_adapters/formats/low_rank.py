"""LoHa, LoKr and Tucker cores as plain LoRA: the same update as a product B A, exactly, or truncated with its error.

Exactly means in real numbers: rows of the factors are multiplied once, and such products of 16-bit values are exact in
float32, in which the results are held. Those of float32 values are rounded once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from .factors import Factors, LohaFactors, LokrFactors, LoraFactors


def low_rank(factors: Factors) -> LoraFactors:
    """Return the LoRA whose update is that of `factors`.

    LoHa of rank r becomes rank r * r (the products of all pairs of rows), LoKr the product of its factors' ranks, Tucker
    keeps its rank; where that is more than the layer's smaller side, the dense update itself is the one factor and the
    identity the other. Magnitudes are kept: what is under them is the same.

    Returns:
        LoRA without `mid`; `factors` itself where it is that already. Otherwise float32 (float64 for float64).
    """
    if isinstance(factors, LoraFactors):
        return factors if factors.mid is None else _fold_core(factors)
    if isinstance(factors, LohaFactors):
        a, b = _loha(factors)
    else:
        assert isinstance(factors, LokrFactors)
        a, b = _lokr(factors)
    if a.shape[0] > min(factors.shape[0], math.prod(factors.shape[1:])):
        a, b = _dense(factors, a.dtype)
    alpha = float(Fraction(factors.scaling) * a.shape[0])
    return LoraFactors(a=a, b=b, alpha=alpha, magnitude=factors.magnitude, magnitude_axis=factors.magnitude_axis)


def truncated(factors: Factors, rank: int) -> tuple[LoraFactors, float]:
    """Return the best LoRA of at most `rank`, and the part of the update it lacks.

    By a singular value decomposition of the update, without forming it: of R_B R_A^T, where B = Q_B R_B and A^T = Q_A R_A.

    Args:
        factors: of any kind.
        rank: at least 1.

    Returns:
        The factors (`low_rank(factors)` where that is small enough), and |update - truncated| / |update| in the
        Frobenius norm, 0.0 where nothing was cut off.
    """
    exact = low_rank(factors)
    if exact.rank <= rank:
        return exact, 0.0
    q_b, r_b = torch.linalg.qr(exact.b.flatten(1).double())
    q_a, r_a = torch.linalg.qr(exact.a.flatten(1).double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    b = (q_b @ u[:, :rank]) * root
    a = root[:, None] * (vh[:rank] @ q_a.T)
    total = s.square().sum().sqrt().item()
    lost = s[rank:].square().sum().sqrt().item()
    kept = replace(
        exact,
        a=a.reshape(a.shape[0], *exact.a.shape[1:]).to(exact.a.dtype),
        b=b.reshape(b.shape[0], b.shape[1], *exact.b.shape[2:]).to(exact.b.dtype),
        alpha=exact.scaling * a.shape[0],
        rank_stabilised=False,
    )
    return kept, lost / total if total else 0.0


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _fold_core(factors: LoraFactors) -> LoraFactors:
    assert factors.mid is not None
    dtype = _wide(factors.a, factors.b, factors.mid)
    a = torch.einsum("mn...,ni->mi...", factors.mid.double(), factors.a.double().flatten(1)).to(dtype)
    return replace(factors, a=a, b=factors.b.to(dtype), mid=None)


def _loha(factors: LohaFactors) -> tuple[Tensor, Tensor]:
    """B[o, (i, j)] = W1a[o, i] W2a[o, j] and A[(i, j), n] = W1b[i, n] W2b[j, n], A with its kernel."""
    dtype = _wide(*factors.tensors.values())
    one, two = ((factors.w1_a, factors.w1_b, factors.t1), (factors.w2_a, factors.w2_b, factors.t2))
    (b1, a1), (b2, a2) = (_sides(a, b, core) for a, b, core in (one, two))
    out, inside = b1.shape[0], a1.shape[1:]
    b = (b1[:, :, None] * b2[:, None, :]).reshape(out, -1)
    a = (a1[:, None] * a2[None, :]).reshape(-1, *inside)
    return _as_layer(a.to(dtype), b.to(dtype), factors.shape)


def _sides(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (out, rank) and (rank, in, *kernel) of one of LoHa's matrices, in float64."""
    if core is None:
        return a.double(), b.double()
    return a.double().T, torch.einsum("ij...,jr->ir...", core.double(), b.double())


def _lokr(factors: LokrFactors) -> tuple[Tensor, Tensor]:
    """kron(B1 A1, B2 A2) = kron(B1, B2) kron(A1, A2)."""
    dtype = _wide(*factors.tensors.values())
    b1, a1 = _product_or_whole(factors.w1, factors.w1_a, factors.w1_b)
    if factors.t2 is not None:
        assert factors.w2_a is not None
        assert factors.w2_b is not None
        b2, a2 = _sides(factors.w2_a, factors.w2_b, factors.t2)
    else:
        b2, a2 = _product_or_whole(factors.w2, factors.w2_a, factors.w2_b)
    inside = factors.second_shape[1:]
    a2 = a2.reshape(a2.shape[0], *inside).contiguous()
    a = torch.kron(a1.reshape(*a1.shape, *[1] * (len(inside) - 1)), a2)
    return _as_layer(a.to(dtype), torch.kron(b1.contiguous(), b2.contiguous()).to(dtype), factors.shape)


def _product_or_whole(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (out, rank) and (rank, in) in float64; a whole matrix is itself times the identity of its smaller side."""
    if whole is None:
        assert a is not None
        assert b is not None
        return a.double(), b.double()
    flat = whole.double().flatten(1)
    identity = torch.eye(min(flat.shape), dtype=torch.float64)
    return (flat, identity) if flat.shape[1] <= flat.shape[0] else (identity, flat)


def _dense(factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The update and an identity, of the rank of the layer's smaller side; the scaling stays outside."""
    flat = (factors.update() / factors.scaling if factors.scaling else 0 * factors.update()).flatten(1)
    b, a = _product_or_whole(flat, None, None)
    return _as_layer(a.to(dtype), b.to(dtype), factors.shape)


def _as_layer(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    kernel = shape[2:]
    return a.reshape(-1, shape[1], *kernel), b.reshape(*b.shape, *[1] * len(kernel))
