"""LoRA on linear layers that read one input: y_i = x W_i^T + bias_i + sum_j s_j (x A_j^T) B_j^T, for each layer i.

One layer is a group of one; q, k and v of an attention are a group of three, and share every pass over x and the one
dX. What backward needs is x, h = x A^T (tokens, rank) and the parameters; nothing else is kept:

    dX = sum_i dY_i W_i + dH A        dH = s dY B        dA = dH^T x        dB = s dY^T h

Where W is unpacked for the product anyway, s B A is put into it on the way (`merged`), and dX = dY (W + s B A) is one
product. A dense W stays as it is: in 16 bits an update smaller than half a unit in W's last place would be rounded away.
There one product is added to the other inside the matrix product (beta = 1); see `split_product`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import lowrank
from .autocast import cast, no_autocast
from .differentiable import once_differentiable
from .dropout import draw_masks, kept_scalings
from .factors import Stack
from .frozen import FrozenWeight


class Dtypes(NamedTuple):
    """What a call computes in: `base` the large products, `low` the low-rank ones."""

    base: torch.dtype
    low: torch.dtype


class Member(NamedTuple):
    """One layer of a group, for one call.

    Attributes:
        weight: how its frozen weight is read; None adds the low-rank product to a result that is there already.
        merged: put the update into the weight. Not with dropout.
        scalings: one factor an adapter.
        output: dtype of its result.
        dropouts: one probability an adapter; empty where nothing is dropped. Only for a group of one.
    """

    weight: FrozenWeight | None
    merged: bool
    scalings: tuple[float, ...]
    output: torch.dtype
    dropouts: tuple[float, ...] = ()


def lora_linear(
    x: torch.Tensor,
    members: Sequence[Member],
    addends: Sequence[torch.Tensor | None],
    factors: Sequence[torch.Tensor],
    dtypes: Dtypes,
) -> tuple[torch.Tensor, ...]:
    """Return each member's output (..., out_i) for x (..., in).

    Args:
        x: any float dtype. Backward keeps it as it is, or the cast of it that the products need where that is smaller.
        members: the layers.
        addends: what is added to each member's result: its bias (out,); of a member without weight its base's result
            (..., out); or None.
        factors: A (rank, in) and B (out, rank) of every adapter of every member, in order.
        dtypes: see Dtypes.
    """
    kept = [None if member.weight is None else member.weight.kept for member in members]
    return _Linear.apply(x, tuple(members), dtypes, *addends, *factors, *kept)  # type: ignore[return-value]


def _stacks(members: Sequence[Member], factors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[Stack]:
    stacks, start = [], 0
    for member in members:
        stop = start + 2 * len(member.scalings)
        stacks.append(Stack(factors[start:stop], kept_scalings(member.scalings, member.dropouts), dtype))
        start = stop
    return stacks


def _all_a(stacks: Sequence[Stack]) -> torch.Tensor:
    return stacks[0].a if len(stacks) == 1 else torch.cat([stack.a for stack in stacks])


def _columns(h: torch.Tensor, stacks: Sequence[Stack]) -> Sequence[torch.Tensor]:
    return (h,) if len(stacks) == 1 else h.split([len(stack.a) for stack in stacks], 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, members: tuple[Member, ...], dtypes: Dtypes, *tensors: Any
    ) -> tuple[torch.Tensor, ...]:
        count = len(members)
        addends, factors = tensors[:count], tensors[count:-count]
        ctx.members, ctx.dtypes, ctx.dtype, ctx.draw = members, dtypes, x.dtype, None
        ctx.addend_dtypes = [None if addend is None else addend.dtype for addend in addends]
        with no_autocast(x.device.type):
            if x.dtype is not dtypes.base and dtypes.low is dtypes.base and x.element_size() > dtypes.base.itemsize:
                x = x.to(dtypes.base)  # what all products take, and half of what autograd would keep
            shape = x.shape
            rows = x.reshape(-1, shape[-1])
            stacks = _stacks(members, factors, dtypes.low)
            if members[0].dropouts:
                masks, ctx.draw = draw_masks(x, members[0].dropouts, dtypes.low)
                h = _dropped_down(x, stacks[0], masks)
            else:
                h = None if all(member.merged for member in members) else lowrank.down(rows, _all_a(stacks))
            mine = (None,) * count if h is None else _columns(h, stacks)
            outputs = []
            for i, member in enumerate(members):
                y = cast(_forward(rows, member, stacks[i], addends[i], mine[i], dtypes), member.output)
                # Not a view for autograd, which would forbid to write to it (an activation in place).
                outputs.append(y if len(shape) == 2 else torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[-1])))
        ctx.save_for_backward(x, h, *factors, *tensors[-count:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        members, dtypes, needs = ctx.members, ctx.dtypes, ctx.needs_input_grad
        count = len(members)
        if all(gradient is None for gradient in gradients):
            return (None,) * len(needs)
        x, h, *tensors = ctx.saved_tensors
        factors = tensors[:-count]
        with no_autocast(x.device.type):
            rows = x.reshape(-1, x.shape[-1])
            stacks = _stacks(members, factors, dtypes.low)
            dys = [_rows_of(dy, rows, stack) for dy, stack in zip(gradients, stacks, strict=True)]
            masks = ctx.draw.again() if ctx.draw is not None else []
            own: list[torch.Tensor | None] = [None] * len(factors)
            if any(needs[3 + count : 3 + count + len(factors)]):
                h = lowrank.down(rows, _all_a(stacks)) if h is None else h
                dhs, own = _factor_gradients(dys, rows, h, stacks, masks)
            else:
                pairs = zip(dys, stacks, strict=True) if needs[0] else ()
                dhs = [stack.scaled(dy.to(dtypes.low) @ stack.b) for dy, stack in pairs]
            dx = _input_gradient(dys, dhs, stacks, members, masks, dtypes) if needs[0] else None
            dx = None if dx is None else cast(dx, ctx.dtype).view(x.shape)
            addends: list[torch.Tensor | None] = [None] * count
            for i, (dy, member) in enumerate(zip(dys, members, strict=True)):
                if needs[3 + i] and gradients[i] is not None:
                    addend = dy.sum(0) if member.weight is not None else dy.view(*x.shape[:-1], dy.shape[-1])
                    addends[i] = cast(addend, ctx.addend_dtypes[i])
            # The output of a member that nobody used: an optimizer must not take its factors' gradient for zero.
            used = [gradients[i] is not None for i, stack in enumerate(stacks) for _ in range(2 * len(stack.ranks))]
            own = [gradient if wanted else None for gradient, wanted in zip(own, used, strict=True)]
        return (dx, None, None, *addends, *own, *[None] * count)


def _rows_of(gradient: torch.Tensor | None, rows: torch.Tensor, stack: Stack) -> torch.Tensor:
    if gradient is None:
        return rows.new_zeros((len(rows), len(stack.b)))
    return gradient.reshape(-1, gradient.shape[-1])


def _forward(
    rows: torch.Tensor,
    member: Member,
    stack: Stack,
    addend: torch.Tensor | None,
    h: torch.Tensor | None,
    dtypes: Dtypes,
) -> torch.Tensor:
    if member.weight is None:
        assert addend is not None
        assert h is not None
        return _added(addend.reshape(-1, addend.shape[-1]), stack.scaled(h), stack.b)
    rows, bias = cast(rows, dtypes.base), None if addend is None else cast(addend, dtypes.base)
    if member.merged:
        weight = member.weight.merged(dtypes.base, stack.a, stack.scaled_b, low=dtypes.low).t()
        return rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    assert h is not None
    weight = member.weight.read(dtypes.base).t()
    return split_product(rows, weight, bias, stack.scaled(h), stack.b)


def split_product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    b: torch.Tensor,
    scaling: float = 1.0,
) -> torch.Tensor:
    """Return rows @ weight + bias + scaling * h @ b^T; autograd can look on.

    The large product is added to the small one, so that only their sum is rounded. On GPUs in 16 bits it is the other way
    round: cuBLAS rounds some products before it adds what is there already (seen on an H200), and what is rounded twice is
    then the small one.

    Args:
        rows: (tokens, in).
        weight: (in, out), of the same dtype.
        bias: (out,), of this dtype.
        h: (tokens, rank).
        b: (out, rank), of h's dtype.
        scaling: factor of the low-rank product.
    """
    if rows.is_cuda and rows.itemsize == 2:
        y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        return lowrank.add_up(y, h, b, scaling)
    return lowrank.up(h, b, bias, rows.dtype, scaling).addmm_(rows, weight)


def _added(result: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return result + h @ b^T, summed in the wider dtype."""
    if result.dtype == h.dtype:
        return torch.addmm(result, h, b.t())
    return result + h @ b.t()


def _factor_gradients(
    dys: Sequence[torch.Tensor],
    rows: torch.Tensor,
    h: torch.Tensor,
    stacks: Sequence[Stack],
    masks: Sequence[torch.Tensor | None],
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Return dH of each member (tokens, ranks), and the gradients of all factors in their order."""
    pairs = [
        lowrank.up_gradients(dy, mine, stack.b)
        for dy, mine, stack in zip(dys, _columns(h, stacks), stacks, strict=True)
    ]
    dhs = [stack.scaled(dh) for stack, (dh, _) in zip(stacks, pairs, strict=True)]
    if masks:
        das: Sequence[torch.Tensor] = [_dropped_down_gradient(dhs[0], rows, stacks[0], masks)]
    else:
        dh = dhs[0] if len(dhs) == 1 else torch.cat(dhs, 1)
        da = lowrank.down_gradient(dh, rows)
        das = [da] if len(stacks) == 1 else da.split([len(stack.a) for stack in stacks])
    both = zip(stacks, das, pairs, strict=True)
    return dhs, [gradient for stack, da, (_, db) in both for gradient in stack.gradients(da, db)]


def _input_gradient(
    dys: Sequence[torch.Tensor],
    dhs: Sequence[torch.Tensor],
    stacks: Sequence[Stack],
    members: Sequence[Member],
    masks: Sequence[torch.Tensor | None],
    dtypes: Dtypes,
) -> torch.Tensor:
    """Return dX (tokens, in): the low-rank part of the members that are not merged, then one product after another."""
    split = [i for i, member in enumerate(members) if not member.merged]
    dx = None
    if masks:
        dx = _dropped_up(dhs[0], stacks[0], masks)
    elif len(split) == 1:
        dx = dhs[split[0]] @ stacks[split[0]].a
    elif split:
        dx = torch.cat([dhs[i] for i in split], 1) @ torch.cat([stacks[i].a for i in split])
    for dy, stack, member in zip(dys, stacks, members, strict=True):
        if member.weight is None:
            continue
        weight = (
            member.weight.merged(dtypes.base, stack.a, stack.scaled_b, low=dtypes.low)
            if member.merged
            else member.weight.read(dtypes.base)
        )
        dy = cast(dy, dtypes.base)
        dx = dy @ weight if dx is None else cast(dx, dtypes.base).addmm_(dy, weight)
    assert dx is not None
    return dx


# ---- with dropout: every adapter has an input of its own ------------------------------------------------------------


def _dropped_down(x: torch.Tensor, stack: Stack, masks: Sequence[torch.Tensor | None]) -> torch.Tensor:
    parts = []
    for a, mask in zip(stack.each_a, masks, strict=True):
        rows = (x if mask is None else x.to(mask.dtype) * mask).reshape(-1, x.shape[-1])
        parts.append(lowrank.down(rows, a))
    return torch.cat(parts, 1)


def _dropped_down_gradient(
    dh: torch.Tensor, rows: torch.Tensor, stack: Stack, masks: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    parts = []
    for own, mask in zip(dh.split(stack.ranks, 1), masks, strict=True):
        dropped = rows if mask is None else rows.to(mask.dtype) * mask.reshape(rows.shape)
        parts.append(lowrank.down_gradient(own, dropped))
    return torch.cat(parts)


def _dropped_up(dh: torch.Tensor, stack: Stack, masks: Sequence[torch.Tensor | None]) -> torch.Tensor:
    total = None
    for own, a, mask in zip(dh.split(stack.ranks, 1), stack.each_a, masks, strict=True):
        part = own @ a
        part = part if mask is None else part * mask.reshape(part.shape)
        total = part if total is None else total + part
    assert total is not None
    return total
