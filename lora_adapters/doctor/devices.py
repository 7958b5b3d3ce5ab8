"""The devices of this machine: what they are, what is free on them, and what they compute in."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from ..free_memory import free_memory


def devices() -> list[dict[str, Any]]:
    """Return the CPU, then each accelerator that torch can use, as dicts; memory in bytes.

    Each has "device", "name", "memory" and "free" (None where it can't be asked), and "bf16": computes in bf16 with
    instructions of its own. A CPU also has "cores", "avx512_bf16" and "cache_disk_free"; a GPU "capability".
    """
    found = [_cpu()]
    try:
        import torch
    except Exception:  # the table of features says why
        return found
    if torch.cuda.is_available():
        found += [_cuda(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        found.append({"device": "mps", "name": "Apple GPU", "memory": total, "free": free_memory("mps"), "bf16": None})
    return found


def why_no_cuda() -> tuple[str, str]:
    """Return ("", "") if torch has a CUDA device, else the reason and what to do."""
    import torch

    if torch.cuda.is_available():
        return "", ""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA", "On a machine with an NVIDIA GPU, install a torch built with CUDA"
    try:
        torch.cuda.init()
        reason = "torch sees no CUDA device"
    except Exception as error:
        reason = f"{error}".strip().partition("\n")[0].partition(". ")[0]
    return reason, "Needs an NVIDIA GPU and its driver"


def _cpu() -> dict[str, Any]:
    import psutil

    name, flags = _cpu_info()
    return {
        "device": "cpu",
        "name": name or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "free": free_memory("cpu"),
        "bf16": None if flags is None else bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        "avx512_bf16": None if flags is None else "avx512_bf16" in flags,
        "cache_disk_free": _cache_disk_free(),
    }


def _cpu_info() -> tuple[str, set[str] | None]:
    """Return the processor's name and its feature flags, as Linux tells them; ("", None) elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "", None
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = told.get("flags", told.get("Features"))
    return told.get("model name", ""), None if flags is None else set(flags.split())


def _cache_disk_free() -> int | None:
    """Return the bytes free where the Hub's files are kept."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = Path(HF_HUB_CACHE)
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free
    except Exception:  # a full report without this number is better than none
        return None


def _cuda(index: int) -> dict[str, Any]:
    import torch

    about = torch.cuda.get_device_properties(index)
    facts: dict[str, Any] = {
        "device": f"cuda:{index}",
        "name": about.name,
        "memory": about.total_memory,
        "free": None,
        "capability": f"{about.major}.{about.minor}",
        "bf16": None,
    }
    try:
        facts["free"] = free_memory(f"cuda:{index}")
        with torch.cuda.device(index):
            facts["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    except Exception as error:
        # One GPU that another process holds, or that fails, must not hide the others.
        facts["problem"] = f"{error}".strip().partition("\n")[0]
    return facts
