"""`lora-adapters plugins`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from .output import Output, output_options


@click.command("plugins")
@output_options
def command(output: Output) -> None:
    """List the installed plugins: ready, needs a package, broken (and why) or blocked."""
    from ..hooks.manager import plugins
    from ..hooks.specs import TrainerSpec

    tasks: dict[str, list[str]] = {}
    for plugin, spec in plugins().collect("lora_adapters_trainers", TrainerSpec):
        tasks.setdefault(plugin, []).append(spec.task)
    facts = [asdict(status) | {"tasks": tasks.get(status.name, [])} for status in plugins().status()]
    output.show(facts, lambda: _print(facts))


def _print(facts: list[dict[str, Any]]) -> None:
    for plugin in facts:
        detail = f": {plugin['detail']}" if plugin["detail"] else ""
        brings = ", ".join([*plugin["hooks"], *(f"task {task}" for task in plugin["tasks"])])
        click.echo(f"{plugin['name']:16} {plugin['state'] + detail:24} {plugin['origin']}  ({brings})")
