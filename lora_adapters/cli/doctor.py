"""`lora-adapters doctor`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

from .output import Output, output_options, print_facts, print_table


@click.command("doctor")
@click.option("--no-try", is_flag=True, help="Judge by versions and devices alone; try nothing.")
@output_options
def command(no_try: bool, output: Output) -> None:
    """Show versions, devices, and what works here and why not.

    What it prints can be pasted into a report: no tokens, names, paths or values of the environment. The exit status is
    0 if torch and peft are of a supported version and adapters on a dense model work, else 1.
    """
    from ..doctor import examine

    facts = examine(not no_try, output.say)
    output.show(facts, lambda: _print(facts))
    sys.exit(0 if facts["core_works"] else 1)


def _print(facts: Mapping[str, Any]) -> None:
    versions = facts["versions"]
    rows = [(p["name"], p["version"], p["supported"], _note(p)) for p in versions]
    print_table(rows, ("package", "version", "supported", "what to do"), "Versions")
    print_table([_device(device) for device in facts["devices"]], ("device", "name", "free", "of", ""), "Devices")
    plugins = [(p["name"], p["state"], p["origin"], p["detail"]) for p in facts["plugins"]]
    print_table(plugins, ("plugin", "state", "from", "why"), "Plugins")
    features = [(f["name"], _verdict(f), f["reason"], f["what_to_do"]) for f in facts["features"]]
    print_table(features, ("feature", "works", "why", "what to do"), "What works here")
    print_facts(facts["environment"], "Environment")


def _note(package: Mapping[str, Any]) -> str:
    if not package["problem"] or package["version"] == "not installed":
        return package["what_to_do"]
    return f"{package['problem']}: {package['what_to_do']}"


def _verdict(feature: Mapping[str, Any]) -> str:
    if not feature["works"]:
        return "no"
    return "yes, tried" if feature["tried"] else "yes"


def _device(device: Mapping[str, Any]) -> tuple[str, ...]:
    from ..budget import format_size

    told = {True: "yes", False: "no", None: "not known"}
    about = [f"bf16: {told[device['bf16']]}"]
    if "cores" in device:
        about.insert(0, f"{device['cores']} cores")
        about.append(f"AVX512-BF16: {told[device['avx512_bf16']]}")
        if device["cache_disk_free"] is not None:
            about.append(f"{format_size(device['cache_disk_free'])} free on the disk of the Hub's cache")
    if "capability" in device:
        about.insert(0, f"compute capability {device['capability']}")
    if "problem" in device:
        about.append(device["problem"])
    free = "not known" if device["free"] is None else format_size(device["free"])
    return device["device"], device["name"], free, format_size(device["memory"]), "; ".join(about)
