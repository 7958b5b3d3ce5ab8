"""LoRA on dense linear layers in nothing but torch's own differentiable operations.

The same products as in `linear`, recorded by autograd: it keeps x, x A^T and the parameters here too.
What `linear` saves on top (dX summed in place) is worth less on a GPU than a backward without Python: there a small
layer's products take less time than one autograd function in Python. torch.compile also sees through these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .autocast import cast
from .frozen import Dense
from .linear import Dtypes, Member, split_product


def is_plain(members: Sequence[Member], factors: Sequence[torch.Tensor], dtypes: Dtypes) -> bool:
    """Return True if these members can be computed here: dense weights and no cast that autograd would keep a W for.

    Each has one adapter, without dropout, and low-rank products of the base's dtype.
    """
    return dtypes.low is dtypes.base and all(
        isinstance(member.weight, Dense)
        and member.weight.weight.dtype is dtypes.base
        and not member.merged
        and not member.dropouts
        and len(member.scalings) == 1
        for member in members
    )


def plain_linear(
    x: torch.Tensor,
    members: Sequence[Member],
    addends: Sequence[torch.Tensor | None],
    factors: Sequence[torch.Tensor],
    dtypes: Dtypes,
) -> tuple[torch.Tensor, ...]:
    """Return each member's output, as `linear.lora_linear` does; see `is_plain`."""
    x, shape = cast(x, dtypes.base), x.shape
    rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    outputs = []
    for i, (member, addend) in enumerate(zip(members, addends, strict=True)):
        assert isinstance(member.weight, Dense)
        (scaling,) = member.scalings
        # The A of a group are not stacked: one whose output nobody used would get zeros for its gradient.
        a, b = cast(factors[2 * i], dtypes.base), cast(factors[2 * i + 1], dtypes.base)
        bias = None if addend is None else cast(addend, dtypes.base)
        y = split_product(rows, member.weight.read(dtypes.base).t(), bias, rows @ a.t(), b, scaling)
        y = cast(y, member.output)
        outputs.append(y if len(shape) == 2 else y.view(*shape[:-1], y.shape[1]))
    return tuple(outputs)
