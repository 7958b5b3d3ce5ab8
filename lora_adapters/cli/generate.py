"""`lora-adapters generate`."""

from __future__ import annotations

from dataclasses import asdict

import click

from .output import Output, output_options


@click.command("generate")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER... [KEY=VALUE]...")
@click.option("--prompt", "-p", "prompts", multiple=True, help="What to answer; may be given several times.")
@click.option("--file", "-f", type=click.Path(exists=True, dir_okay=False), help="Prompts, one per line.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1), help="Length of an answer.")
@click.option(
    "--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0 takes the likeliest token."
)
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1), help="Nucleus to sample from.")
@click.option("--seed", default=0, show_default=True, help="The same for the base and each adapter.")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, not through the chat template.")
@output_options
def command(
    adapters: tuple[str, ...],
    prompts: tuple[str, ...],
    file: str | None,
    output: Output,
    **options: float | int | bool,
) -> None:
    """Show what the base and each ADAPTER (a run's or an adapter's folder) answer to the same prompts.

    Classifiers answer with the likeliest labels, reward models with their reward.
    """
    from pathlib import Path

    from ..errors import RequestError
    from ..runs.progress import Progress
    from ..runs.runner import runner_for
    from ..runs.saved import named, recipe_for
    from .arguments import split

    asked = [*prompts, *(Path(file).read_text(encoding="utf-8").splitlines() if file else ())]
    asked = [prompt for prompt in asked if prompt.strip()]
    if not asked:
        raise RequestError("Give a prompt: --prompt TEXT, or --file with one per line.")
    paths, overrides = split(adapters)
    found = named(paths)
    progress = Progress(quiet=output.quiet or output.as_json)
    runner = runner_for(recipe_for(found, {}, overrides))
    runner.accept(found)
    samples = runner.generate(found, asked, progress, **options)

    def show() -> None:
        for sample in samples:
            click.secho(sample.title, bold=True)
            width = max(len(label) for label, _ in sample.parts)
            for label, text in sample.parts:
                first, *rest = text.splitlines() or [""]
                click.echo("\n".join([f"  {label:{width}}  {first}", *(" " * (width + 4) + line for line in rest)]))
            click.echo()

    output.show([asdict(sample) for sample in samples], show)
