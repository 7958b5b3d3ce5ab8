"""Several processes that train one adapter: what they must have in common, and who writes.

The gradients of an adapter are few values, so one sum over the processes after each step's last batch serves; no wrapper
around the model is needed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as distributed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn


def count() -> int:
    """Return how many processes a launcher (torchrun, accelerate launch) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Return the number of this process among those that a launcher started; the main one, and one without, is 0."""
    return int(os.environ.get("RANK") or 0) if count() > 1 else 0


def own_device(device: torch.device) -> torch.device:
    """Return the GPU of this process, where a launcher started several and the device says none in particular."""
    if count() == 1 or device.type != "cuda" or device.index is not None:
        return device
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
    torch.cuda.set_device(own)
    return own


@contextmanager
def main_first(device: torch.device) -> Iterator[None]:
    """Let the main process do something before the others, which then find its files."""
    if count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=device.type == "cpu").main_process_first():
        yield


def sum_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the sum of the processes' gradients. A process whose share of a step is empty adds nothing."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    _together([p.grad for p in parameters if p.grad is not None], distributed.all_reduce)


def same_values(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the values of the main one."""
    if accelerator.num_processes > 1:
        _together([p.detach() for p in parameters], lambda flat: distributed.broadcast(flat, 0))


def agreed(accelerator: Accelerator, asked: signal.Signals | None) -> signal.Signals | None:
    """Return the signal that any of the processes got, the same in all of them."""
    if accelerator.num_processes == 1:
        return asked
    number = torch.tensor(int(asked or 0), device=accelerator.device)
    distributed.all_reduce(number, distributed.ReduceOp.MAX)
    return signal.Signals(int(number)) if int(number) else None


def _together(tensors: Sequence[Tensor], operation: object) -> None:
    """Apply a collective operation in place to all tensors of a dtype at once: one message instead of hundreds."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in group])
        operation(flat)  # type: ignore[operator]
        for tensor, values in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(values.view_as(tensor))
