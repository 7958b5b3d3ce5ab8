"""`lora-adapters eval`."""

from __future__ import annotations

from typing import Any

import click

from .output import Output, output_options, print_table


@click.command("eval")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER... [KEY=VALUE]...")
@click.option("--data", metavar="FILE", help="Measure on this file, folder or dataset instead of the run's eval data.")
@output_options
def command(adapters: tuple[str, ...], data: str | None, output: Output) -> None:
    """Measure the base and each ADAPTER (a run's or an adapter's folder) on the same data, side by side.

    An adapter that `train` made brings its recipe. For any other, say what the data holds:
    task=causal-lm data.prompt=question data.completion=answer.
    """
    from ..errors import RequestError
    from ..runs.folder import finite
    from ..runs.progress import Progress
    from ..runs.runner import runner_for
    from ..runs.saved import named, recipe_for
    from .arguments import split

    paths, overrides = split(adapters)
    found = named(paths)
    recipe = recipe_for(found, {} if data is None else {"data": _only(data)}, overrides)
    if data is not None and getattr(recipe.data, "eval", None) != data:
        raise RequestError(f"--data: the task {recipe.task!r} has no data.eval; change its own keys as key=value.")
    progress = Progress(quiet=output.quiet or output.as_json)
    runner = runner_for(recipe)
    runner.accept(found)
    runner.check(("eval",))
    metrics = runner.evaluate(found, progress)
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [[name, *(f"{values[name]:.4g}" for values in metrics.values())] for name in names]
    output.show(finite(metrics), lambda: print_table(rows, ("", *metrics)))


def _only(data: str) -> dict[str, Any]:
    """Return the keys of a recipe's data that make all of `data`, and nothing else, the eval data."""
    ways = {
        "eval_fraction": 0.0,
        "eval_split": None,
        "subset": None,
        "split": "train",
        "limit": None,
        "eval_limit": None,
    }
    return {"train": data, "eval": data, **ways}
