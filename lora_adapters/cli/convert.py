"""`lora-adapters convert`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .output import Output, output_options, print_facts, print_table

if TYPE_CHECKING:
    from ..formats import Conversion


@click.command("convert")
@click.argument("source")
@click.argument("target")
@click.option("--to", required=True, help="diffusers, peft, kohya, lycoris, ai-toolkit, or a plugin's format.")
@click.option("--from", "format", help="The source's format; found if left out.")
@click.option("--family", help="What it is for, where its file does not tell: sd1, sd2, sdxl, sd3 or flux.")
@click.option(
    "--max-rank", type=click.IntRange(1), help="Cut layers to this rank; says what part of the update is lost."
)
@click.option("--overwrite", is_flag=True, help="Replace what is at TARGET.")
@output_options
def command(
    source: str,
    target: str,
    to: str,
    format: str | None,
    family: str | None,
    max_rank: int | None,
    overwrite: bool,
    output: Output,
) -> None:
    """Write the adapter of a diffusion model in SOURCE (a file or a folder) in another format.

    Says what the format can't hold as it was, and how far off that is. What has no form there is an error; nothing is ever
    left out silently.
    """
    from ..formats import convert

    output.say("converting")
    made = convert(source, target, to, format=format, family=family, max_rank=max_rank, overwrite=overwrite)
    output.show(asdict(made), lambda: _print(made))


def _print(made: Conversion) -> None:
    layers = ", ".join(f"{component} {count}" for component, count in made.layers.items())
    facts = {"read": f"{made.source} ({made.source_format})", "written": f"{made.target} ({made.target_format})"}
    print_facts(facts | {"for": made.family or "not told by the file", "adapted layers": layers})
    if made.notes:
        print_table([(note,) for note in made.notes], title="Not as it was")
    else:
        click.echo("Everything is as it was.")
