"""`lora-adapters plugins`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click


@click.command("plugins")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the installed plugins: ready, needs a package, broken (and why) or blocked."""
    from ..hooks.manager import plugins

    status = plugins().status()
    if as_json:
        click.echo(json.dumps([asdict(s) for s in status], indent=2))
        return
    for plugin in status:
        detail = f": {plugin.detail}" if plugin.detail else ""
        click.echo(f"{plugin.name:16} {plugin.state + detail:24} {plugin.origin}  ({', '.join(plugin.hooks)})")
