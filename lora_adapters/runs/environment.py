"""Versions and devices of this machine, as a run records them: nothing private, nothing that changes while it runs."""

from __future__ import annotations


def environment() -> dict[str, str]:
    """Return name -> text: Python, the platform, every package we know of that is installed, and the devices."""
    from ..budget import format_size
    from ..doctor.devices import devices
    from ..doctor.private import paste_ready
    from ..doctor.versions import packages

    found = {p.name: p.version for p in packages() if p.version != "not installed"}
    for device in devices():
        cores = f", {device['cores']} cores" if "cores" in device else ""
        found[device["device"]] = f"{device['name']}{cores}, {format_size(device['memory'] or 0)}"
    return paste_ready(found)
