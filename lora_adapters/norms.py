"""The size of an adapter's update."""

from __future__ import annotations

import torch


def update_norm(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the Frobenius norm of scaling * B @ A, without forming the product.

    |BA|^2 = trace((A A^T)(B^T B)), which needs rank x rank matrices only.

    Args:
        a: (rank, ...), floating.
        b: (out, rank / groups, ...), floating. More than one group is stock PEFT's grouped convolution: each group of
            B's rows uses the rows of A that belong to it.
        scaling: the factor.

    Returns:
        A scalar in float32, or in float64 for float64 factors.
    """
    a, b = (factor.detach().to(torch.promote_types(factor.dtype, torch.float32)).flatten(1) for factor in (a, b))
    groups = a.shape[0] // b.shape[1]
    pairs = zip(a.tensor_split(groups), b.tensor_split(groups), strict=True)
    square = torch.stack([((x @ x.T) * (y.T @ y)).sum() for x, y in pairs]).sum()
    # Rounding can take the sum of a tiny update below zero.
    return abs(scaling) * square.clamp_min(0).sqrt()
