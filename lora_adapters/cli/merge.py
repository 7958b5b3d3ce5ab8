"""`lora-adapters merge`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .output import Output, output_options, print_facts

if TYPE_CHECKING:
    from ..merged_checkpoint import MergedCheckpoint


@click.command("merge")
@click.argument("adapter")
@click.argument("out")
@click.option("--base", help="Folder, file or Hub name of the base; what the adapter's config names if left out.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Dtype to load and write; auto is the checkpoint's.",
)
@click.option("--device", default="cpu", show_default=True, help='Where to merge: "cpu", "cuda", "auto".')
@click.option("--task", help='"causal-lm", "text-classification", ...; what the adapter says if left out.')
@click.option("--scale", type=float, default=1.0, show_default=True, help="Factor of a diffusion model's adapter.")
@click.option("--family", help="What that is for, where its file does not tell: sd1, sd2, sdxl, sd3 or flux.")
@click.option("--overwrite", is_flag=True, help="Replace the model in OUT, once the new one is complete.")
@click.option("--backend", help="Who loads the base; the first that can if left out.")
@click.option("--revision", help="Hub revision of the base.")
@click.option("--adapter-revision", help="Hub revision of the adapter.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the base brings.")
@output_options
def command(adapter: str, out: str, base: str | None, task: str | None, output: Output, **options: Any) -> None:
    """Merge ADAPTER (a folder or a Hub name) into its base and write a plain model to the folder OUT.

    Everything is checked before the base's weights are read. OUT appears complete or not at all, with the tokenizer's
    and the processor's files beside the model.

    For a diffusion model, ADAPTER is a file or a folder of any format, and BASE a checkpoint in one safetensors file (OUT is
    then a file too) or a diffusers folder.
    """
    show = not (output.quiet or output.as_json)
    _quieten(show)
    output.say("reading the adapter")
    from ..merged_checkpoint import merge_checkpoint

    if task is not None:
        options["task"] = task
    with _terminated_like_interrupted():
        made = merge_checkpoint(base, adapter, out, progress=show, **options)
    output.show(asdict(made), lambda: _print(made))


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Clean up after SIGTERM as after Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _quieten(show: bool) -> None:
    """Keep transformers from calling weights missing that the adapter brings, and from bars that nobody asked for."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not show:
        os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def _print(made: MergedCheckpoint) -> None:
    from ..budget import format_size

    facts = {
        "folder": made.folder,
        "model": f"{made.model}, {made.dtype}, {format_size(made.nbytes)}",
        "base": made.base + (" (named by the adapter's config)" if made.base_from == "adapter" else ""),
        "merged": f"{made.layers} layers"
        + (f"; from the adapter whole: {', '.join(made.trained)}" * bool(made.trained)),
        "copied": ", ".join(made.copied) or "nothing",
    }
    print_facts(facts | ({"note": "; ".join(made.notes)} if made.notes else {}))
