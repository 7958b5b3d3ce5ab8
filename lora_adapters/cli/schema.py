"""`lora-adapters schema`."""

from __future__ import annotations

import json

import click

from .completion import task_names
from .output import Output, output_options


@click.command("schema")
@click.argument("task", required=False, shell_complete=task_names)
@output_options
def command(task: str | None, output: Output) -> None:
    """Print the JSON Schema of recipes, of one TASK or of all, so that an editor completes and checks them.

    \b
    lora-adapters schema > recipe.schema.json

    For editors with the YAML language server (VS Code, Neovim, Helix, ...) a recipe then begins with the line

    \b
    # yaml-language-server: $schema=recipe.schema.json
    """
    from ..recipes.json_schema import json_schema

    made = json_schema(task)
    output.show(made, lambda: click.echo(json.dumps(made, indent=2)))
