"""The most memory that a stretch of work took, on the device it ran on."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from construction on.

    On CUDA the allocator's peak of tensors; elsewhere the process's resident memory, in which everything is: Python,
    the libraries and the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        with suppress(OSError):  # elsewhere the high-water mark covers the whole process
            _CLEAR.write_text("5")  # resets it (proc(5))
        self.before = _resident()

    def read(self) -> dict[str, int]:
        """Return bytes: "peak" since construction, and "before" it."""
        if self.device.type == "cuda":
            return {"peak": torch.cuda.max_memory_allocated(self.device), "before": self.before}
        return {"peak": _highest_resident(), "before": self.before}


def now(device: torch.device) -> int:
    """Return the bytes in use now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident()


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _highest_resident() -> int:
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", _resident()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
