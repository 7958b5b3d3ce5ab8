"""`lora-adapters plan`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .output import Output, output_options, print_facts, print_table

if TYPE_CHECKING:
    from ..attach_plan import AttachPlan
    from ..memory import StepMemory

#: What --compute accepts -> dtype of autocast.
_COMPUTE = {"auto": None, "float32": None, "bfloat16": "bfloat16", "float16": "float16"}


@click.command("plan")
@click.argument("model")
@click.option("--rank", default=16, show_default=True, type=int, help="Rank of A and B.")
@click.option("--alpha", type=float, help="Scale times rank; the rank itself if left out.")
@click.option(
    "--targets", default="auto", show_default=True, help='"attention+mlp", "all-linear", "q+v", "re:...", ...'
)
@click.option("--quantization", help='Store the base as "nf4", "fp4", "int8" or what a plugin offers.')
@click.option("--task", help='"causal-lm", "text-classification", ...; what the checkpoint names if left out.')
@click.option("--dtype", default="auto", show_default=True, help="Dtype of dense weights; auto is the checkpoint's.")
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Rows per step.")
@click.option("--sequence-length", default=512, show_default=True, type=click.IntRange(1), help="Tokens per row.")
@click.option("--checkpointing", is_flag=True, help="With gradient checkpointing.")
@click.option("--optimizer", default="adamw", show_default=True, help='"adamw", "adamw_8bit", "sgd", "adafactor".')
@click.option(
    "--compute", type=click.Choice(list(_COMPUTE)), default="auto", help="Mixed precision, as bf16=True sets."
)
@click.option("--device", default="cuda", show_default=True, help="Where the step will run; it need not be here.")
@click.option("--gpu", metavar="SIZE", help='Say whether the step fits this much memory ("16GiB"), and what would.')
@click.option("--revision", help="Hub revision.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings.")
@output_options
def command(
    model: str,
    gpu: str | None,
    batch_size: int,
    sequence_length: int,
    checkpointing: bool,
    optimizer: str,
    compute: str,
    device: str,
    output: Output,
    rank: int,
    alpha: float | None,
    targets: str,
    quantization: str | None,
    **source: Any,
) -> None:
    """Show what an adapter on MODEL (a folder or a Hub name) would be, and the memory that training it takes.

    The model's config is read, its weights are not. With --gpu the exit status is 1 if the step does not fit.
    """
    from ..budget import parse_size

    limit = None if gpu is None else parse_size(gpu)
    output.say(f"building {model} without its weights")
    base = _skeleton(model, source)
    asked = {"rank": rank, "alpha": alpha, "targets": targets}

    def planned(fmt: str | None) -> AttachPlan:
        from ..api import plan

        return plan(base, **asked, quantization=fmt)

    def memory(made: AttachPlan, rows: int, length: int, checkpointed: bool) -> StepMemory:
        import torch

        output.say(f"predicting {rows} x {length}{', checkpointed' if checkpointed else ''}")
        autocast = _COMPUTE[compute]
        return made.memory(
            rows,
            length,
            optimizer=optimizer,
            autocast=autocast and getattr(torch, autocast),
            device=device,
            checkpointing=checkpointed or None,
        )

    made = planned(quantization)
    step = memory(made, batch_size, sequence_length, checkpointing)
    facts = _facts(made, step)
    if limit is not None:
        fits = step.total <= limit
        settings = [] if fits else _settings(planned, memory, limit, batch_size, sequence_length, quantization)
        facts["gpu"] = {"bytes": limit, "fits": fits, "settings": settings}
    output.show(facts, lambda: _print(made, step, facts.get("gpu"), (batch_size, sequence_length)))
    if limit is not None and step.total > limit:
        raise SystemExit(1)


def _skeleton(model: str, source: dict[str, Any]) -> Any:
    from ..api import skeleton

    given = {key: value for key, value in source.items() if value is not None}
    return skeleton(model, **given)


def _settings(
    planned: Callable[[str | None], AttachPlan],
    memory: Callable[[AttachPlan, int, int, bool], StepMemory],
    limit: int,
    batch_size: int,
    sequence_length: int,
    quantization: str | None,
) -> list[dict[str, Any]]:
    from ..budget import suggest_fit
    from ..errors import MissingDependencyError

    plans = {quantization: planned(quantization)}
    if quantization is None:
        with contextlib.suppress(MissingDependencyError):  # what is not installed is no way out
            plans["nf4"] = planned("nf4")

    def total(rows: int, length: int, checkpointed: bool, fmt: str | None) -> int:
        return memory(plans[fmt], rows, length, checkpointed).total

    found = suggest_fit(
        total, limit, batch_size=batch_size, sequence_length=sequence_length, quantizations=tuple(plans)
    )
    return [asdict(setting) for setting in found]


def _facts(made: AttachPlan, step: StepMemory) -> dict[str, Any]:
    return {
        "backend": made.backend,
        "family": made.family,
        "task_type": made.task_type,
        "total_parameters": made.total_parameters,
        "trainable_parameters": made.trainable_parameters,
        "layers": [asdict(layer) for layer in made.layers],
        "skipped": [asdict(layer) for layer in made.skipped],
        "quantize": dict(made.quantize),
        "trained": list(made.trained),
        "notes": list(made.notes),
        "memory": asdict(step),
    }


def _print(made: AttachPlan, step: StepMemory, gpu: dict[str, Any] | None, shape: tuple[int, int]) -> None:
    from ..budget import format_size

    click.echo(str(made))
    parts = {name: format_size(size) for name, size in asdict(step).items()}
    print_facts(parts, title=f"Memory of a training step, {shape[0]} x {shape[1]}")
    if gpu is None:
        return
    size = format_size(gpu["bytes"])
    if gpu["fits"]:
        click.echo(f"It fits {size}, with {format_size(gpu['bytes'] - step.total)} to spare.")
        return
    click.echo(f"It does not fit {size}: {format_size(step.total - gpu['bytes'])} too much.")
    if not gpu["settings"]:
        click.echo("No smaller batch, shorter sequence or 4-bit base fits either: take a smaller model.")
        return
    rows = [
        (
            f"{s['batch_size']} x {s['sequence_length']}",
            "yes" if s["checkpointing"] else "no",
            s["quantization"] or "dense",
            format_size(s["nbytes"]),
        )
        for s in gpu["settings"]
    ]
    print_table(rows, ("batch x sequence", "checkpointing", "base", "memory"), title="What would fit")
