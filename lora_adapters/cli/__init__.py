"""The command line. Each command's module is imported when the command runs, so that --help answers at once."""

from __future__ import annotations

import importlib
from typing import Any

import click

from .. import __version__

#: Section of --help -> command -> (module here, one line).
_SECTIONS = {
    "Train": {
        "recipes": ("recipes", "List the tasks, and the recipes to start from."),
        "new": ("new", "Write a recipe whose comments say what to change."),
        "plan": ("plan", "Show what an adapter would be, what it takes, what fits a GPU."),
        "train": ("train", "Train what a recipe describes; writes a folder with a report."),
        "schema": ("schema", "Print the JSON Schema of recipes, for editors."),
    },
    "Use": {
        "eval": ("eval", "Measure the base and saved adapters on the same data."),
        "generate": ("generate", "Show what the base and saved adapters answer to the same prompts."),
        "inspect": ("inspect", "Show what an adapter file holds, check it, say where it loads."),
        "convert": ("convert", "Write an image model's adapter in another format."),
        "merge": ("merge", "Merge a saved adapter into its base and write a plain model."),
        "push": ("push", "Upload an adapter to the Hub, or list what would go up."),
    },
    "About this installation": {
        "doctor": ("doctor", "Show versions, devices, and what works here and why not."),
        "plugins": ("plugins", "List the installed plugins and what became of each."),
        "demo": ("demo", "Fine-tune text, image and diffusion models here, in a few minutes."),
    },
}
_COMMANDS = {name: entry for section in _SECTIONS.values() for name, entry in section.items()}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f".{_COMMANDS[cmd_name][0]}", __name__)
        return module.command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            from ..error_text import did_you_mean

            ctx.fail(f"No such command {args[0]!r}.{did_you_mean(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                # Padded, so that all sections have the same columns.
                width = max(map(len, _COMMANDS))
                formatter.write_dl([(f"{name:{width}}", line) for name, (_, line) in commands.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with: lora-adapters recipes",
)
@click.version_option(__version__, prog_name="lora-adapters")
@click.option("--traceback", is_flag=True, help="Show the whole traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, traceback: bool) -> None:
    """LoRA for every PyTorch model you already have."""
    import logging
    import warnings

    ctx.obj = {"traceback": traceback}
    # What other packages say of their own future, or of kernels they could fetch, is nothing the user can act on here.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def main() -> None:
    """Run the command line: one line for an error raised on purpose, exit code 1."""
    import sys

    from ..errors import LoraAdaptersError

    try:
        cli.main(prog_name="lora-adapters")
    except LoraAdaptersError as error:
        if "--traceback" in sys.argv:
            raise
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
