"""Which device a model goes to."""

from __future__ import annotations

import torch

from .errors import RequestError


def pick_device(device: str) -> torch.device:
    """Return the device to use; "auto" takes an accelerator if there is one.

    Raises:
        RequestError: the device is not there.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise RequestError(f"{device!r} is no device. Give 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'.") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    count = torch.cuda.device_count() if wanted.type == "cuda" else 1
    if not there.get(wanted.type, True) or (wanted.index or 0) >= count:
        raise RequestError(f"device={device!r} was asked for, but PyTorch sees no such device here. Use device='auto'.")
    return wanted
