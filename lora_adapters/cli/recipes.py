"""`lora-adapters recipes`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from .completion import recipe_names
from .output import Output, output_options, print_table


@click.command("recipes")
@click.argument("name", required=False, shell_complete=recipe_names)
@output_options
def command(name: str | None, output: Output) -> None:
    """List the tasks and the recipes to start from, or print the recipe NAME.

    'lora-adapters new NAME' writes one to a file.
    """
    from ..recipes.starters import starter, starters

    if name is not None:
        found = starter(name)
        output.show(asdict(found), lambda: click.echo(found.text, nl=False))
        return
    tasks = _tasks()
    known = list(starters().values())
    listed = [{"name": one.name, "task": one.task, "summary": one.summary} for one in known]
    output.show({"tasks": tasks, "recipes": listed}, lambda: _print(tasks, listed))


def _tasks() -> list[dict[str, Any]]:
    from ..hooks.manager import install_hint, missing_packages, plugins

    facts = []
    for spec in plugins().trainers().values():
        missing = missing_packages(spec.requires)
        facts.append(
            {
                "task": spec.task,
                "summary": spec.summary,
                "state": "needs" if missing else "ready",
                "missing": missing,
                "install": install_hint(missing, spec.extra) if missing else "",
            }
        )
    return facts


def _print(tasks: list[dict[str, Any]], recipes: list[dict[str, str]]) -> None:
    def state(task: dict[str, Any]) -> str:
        return f"needs {', '.join(task['missing'])}: {task['install']}" if task["missing"] else "ready"

    print_table([(task["task"], task["summary"], state(task)) for task in tasks], ("task", "what it trains", "state"))
    print_table([(one["name"], one["summary"]) for one in recipes], ("recipe", "what it is for"))
    click.echo("Write one to a file: lora-adapters new NAME")
