"""Memory that can be allocated now, on the host and on accelerators."""

from __future__ import annotations

from pathlib import Path

from .errors import RequestError


def free_memory(device: str = "cpu") -> int:
    """Return the bytes that can be allocated now: on the host within the limits of the control group and of the process
    (`ulimit -v`, PyTorch's memory fraction), or on an accelerator.

    Raises:
        RequestError: the device is not there, or its free memory can't be asked.
    """
    kind = device.partition(":")[0]
    if kind == "cpu":
        import psutil

        limits = [_cgroup_free(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), _address_space_free()]
        return min([psutil.virtual_memory().available, *(n for n in limits if n is not None)])
    import torch

    if kind == "cuda" and torch.cuda.is_available():
        index = torch.device(device).index
        index = torch.cuda.current_device() if index is None else index
        free, total = torch.cuda.mem_get_info(index)
        reserved = torch.cuda.memory_reserved(index)
        # `torch.cuda.set_per_process_memory_fraction` limits what this process reserves.
        ours = int(torch.cuda.get_per_process_memory_fraction(index) * total) - reserved
        return max(0, min(free, ours)) + reserved - torch.cuda.memory_allocated(index)
    if kind == "mps" and torch.backends.mps.is_available():
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    raise RequestError(f"Free memory of device {device!r} can't be asked: it is not there. Use cpu, cuda or mps.")


def _address_space_free() -> int | None:
    """Return what the process may still map, or None where nothing limits it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    import psutil

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else max(0, limit - psutil.Process().memory_info().vms)


def _cgroup_free(membership: Path, root: Path) -> int | None:
    """Return the least of limit - use over this process's control group and its parents (v2 and v1), or None."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    free: list[int] = []
    for _, controllers, path in lines:
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        for folder in [group, *group.parents]:
            if (found := _group_free(folder, *names)) is not None:
                free.append(found)
            if folder == base:
                break
    return min(free, default=None)


def _group_free(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        maximum, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if maximum == "max" else max(0, int(maximum) - used + int(stat.get(reclaimable, 0)))
