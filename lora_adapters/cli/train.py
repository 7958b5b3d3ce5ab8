"""`lora-adapters train`."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import click

from .output import Output, output_options, print_facts, print_table

if TYPE_CHECKING:
    from ..report.facts import RunFacts


@click.command("train")
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@output_options
def command(recipe: str, overrides: tuple[str, ...], output: Output) -> None:
    """Train the adapter that RECIPE describes, and write one folder: adapter, metrics, report.

    KEY=VALUE changes a key of the recipe, such as training.epochs=3. Ctrl-C and SIGTERM save and exit; the same command
    with resume=true goes on from there, exactly.

    With --json a run that began prints its facts, however it ended: "status" says how, and an error is on stderr.

    Exit status: 0 trained, 1 an error or a run that diverged, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        _train(recipe, overrides, output)
    except KeyboardInterrupt:  # before the run began, or the second one
        click.echo("Error: Stopped at once.", err=True)
        raise SystemExit(128 + signal.SIGINT) from None


def _train(recipe: str, overrides: tuple[str, ...], output: Output) -> None:
    from ..recipes.reading import read_recipe

    checked = read_recipe(recipe, overrides)
    from ..runs.folder import finite
    from ..runs.progress import Progress
    from ..runs.run import train
    from ..runs.runner import runner_for
    from ..runs.stopping import InterruptedRunError

    progress = Progress(quiet=output.quiet or output.as_json)
    progress.say(f"{checked.task} on {checked.model.name}: loading PyTorch and the task's packages")

    def show(facts: RunFacts) -> None:
        if output.as_json or facts.status == "finished":
            output.show(finite(facts.as_dict()), lambda: _print(facts, checked.output))

    try:
        train(checked, runner_for(checked), progress, on_end=show)
    except InterruptedRunError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(error.exit_status) from None


def _print(facts: RunFacts, folder: str) -> None:
    from ..budget import format_size
    from ..runs.progress import duration

    names = dict.fromkeys([*facts.before, *facts.after])
    if names:
        rows = [(name, _number(facts.before.get(name)), _number(facts.after.get(name))) for name in names]
        print_table(rows, ("on the eval data", "base", "adapter"))
    print_facts(
        {
            "steps": facts.steps,
            "time": duration(facts.seconds),
            **{f"{name} per second": f"{rate:,.1f}" for name, rate in facts.throughput.items()},
            "trained": f"{facts.trainable_parameters:,} of {facts.total_parameters:,} values",
            "peak memory": format_size(facts.memory_measured.get("peak", 0)),
            "adapter": f"{folder}/adapter ({format_size(facts.adapter_bytes)})",
            "report": f"{folder}/report.html",
        }
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
