"""Mixed precision: which dtype it asks for, and how to keep it out of code that has chosen its dtypes itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype that torch.autocast computes products in on this device type now, None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast; entering it costs nothing where it is off."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in a dtype. Calling .to for nothing takes longer than looking."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)
