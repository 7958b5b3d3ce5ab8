"""Which of the equal functions computes linear layers: chosen by what is asked for and where, not by timing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .linear import Dtypes, Member, lora_linear
from .plain import is_plain, plain_linear
from .single import single_linear


def linear_layers(
    x: torch.Tensor,
    members: Sequence[Member],
    addends: Sequence[torch.Tensor | None],
    factors: Sequence[torch.Tensor],
    dtypes: Dtypes,
) -> tuple[torch.Tensor, ...]:
    """Return each member's output for x; arguments as for `linear.lora_linear`.

    Dense layers on a GPU, and in compiled code, are computed by torch's own operations (`plain`): small layers there wait
    for Python, and large ones gain nothing from a function of ours. On the CPU such a function sums dX in place, which
    counts. One layer with one adapter takes the short form of it (`single`).
    """
    if (x.device.type != "cpu" or torch.compiler.is_compiling()) and is_plain(members, factors, dtypes):
        return plain_linear(x, members, addends, factors, dtypes)
    if len(members) == 1:
        weight, merged, scalings, output, dropouts = members[0]
        if weight is not None and not dropouts and len(scalings) == 1:
            a, b = factors
            return (single_linear(x, weight, merged, addends[0], a, b, scalings[0], *dtypes, output),)
    return lora_linear(x, members, addends, factors, dtypes)
