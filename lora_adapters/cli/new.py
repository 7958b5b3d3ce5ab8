"""`lora-adapters new`."""

from __future__ import annotations

from pathlib import Path

import click

from .completion import recipe_names
from .output import Output, output_options


@click.command("new")
@click.argument("name", shell_complete=recipe_names)
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--model", help="A folder or a Hub name, put into the recipe.")
@click.option("--data", help="The training data, put into the recipe: a file, a folder or a Hub dataset.")
@click.option("--output", "run", metavar="FOLDER", help="The folder of the run, put into the recipe.")
@click.option("--force", "-f", is_flag=True, help="Replace a file that is there.")
@output_options
def command(
    name: str,
    file: Path | None,
    model: str | None,
    data: str | None,
    run: str | None,
    force: bool,
    output: Output,
) -> None:
    """Write the recipe NAME to FILE (NAME.yaml if left out), with comments that say what to change.

    'lora-adapters recipes' lists the names.
    """
    from ..errors import RequestError
    from ..recipes.starters import data_key, filled, starter

    chosen = starter(name)
    path = Path(f"{name}.yaml") if file is None else file
    given = {("model", "name"): model, data_key(chosen.task): data, ("output",): run}
    text = filled(
        chosen.text.replace("THIS_FILE", str(path)), {key: value for key, value in given.items() if value is not None}
    )
    try:
        with open(path, "w" if force else "x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError:
        raise RequestError(f"{path} is there already: give another file, or --force to replace it.") from None
    except FileNotFoundError:
        raise RequestError(f"There is no folder {path.parent}: make it first.") from None
    except OSError as error:
        raise RequestError(f"{path} can't be written: {error.strerror}.") from None
    facts = {"file": str(path), "recipe": chosen.name, "task": chosen.task}
    output.show(facts, lambda: click.echo(f"{path} is written. Next: lora-adapters train {path}"))
