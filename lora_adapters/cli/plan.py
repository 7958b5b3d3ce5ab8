"""`lora-adapters plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..budget import format_shape
from ..errors import RequestError
from .output import Output, output_options, print_facts, print_table

if TYPE_CHECKING:
    from ..attach_plan import AttachPlan
    from ..memory import StepMemory

#: What --compute accepts -> dtype of autocast.
_COMPUTE = {"auto": None, "float32": None, "bfloat16": "bfloat16", "float16": "float16"}


@click.command("plan")
@click.argument("model", metavar="MODEL|RECIPE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
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
@click.pass_context
def command(
    context: click.Context, model: str, overrides: tuple[str, ...], gpu: str | None, output: Output, **options: Any
) -> None:
    """Show what an adapter on MODEL (a folder or a Hub name) would be, and the memory that training it takes.

    The model's config is read, its weights are not. With --gpu the exit status is 1 if the step does not fit.

    Of a RECIPE (a .yaml file, with KEY=VALUE changes as for train) everything is taken from it but --device and --gpu.
    """
    from ..budget import parse_size

    limit = None if gpu is None else parse_size(gpu)
    if Path(model).suffix in (".yaml", ".yml"):
        step = _recipe_step(context, model, overrides, limit, options, output)
    elif overrides:
        raise RequestError(f"{overrides[0]!r}: only a recipe (a .yaml file) takes key=value; a model takes options.")
    else:
        step = _model_step(model, options, output)
    made = step.planned(step.quantization)
    predicted = step.memory(made, step.batch_size, step.length, step.checkpointing)
    facts = _facts(made, predicted)
    if limit is not None:
        fits = predicted.total <= limit
        settings = [] if fits else _settings(step, made, limit)
        facts["gpu"] = {"bytes": limit, "fits": fits, "settings": settings}
    output.show(facts, lambda: _print(made, predicted, facts.get("gpu"), (step.batch_size, step.length)))
    if limit is not None and predicted.total > limit:
        raise SystemExit(1)


@dataclass(frozen=True)
class _Step:
    """A training step to plan: what it is, and how to plan and predict it with other settings."""

    quantization: Any
    batch_size: int
    length: int
    checkpointing: bool
    planned: Callable[[Any], AttachPlan]
    memory: Callable[[AttachPlan, int, int, bool], StepMemory]


def _model_step(model: str, options: dict[str, Any], output: Output) -> _Step:
    from ..api import plan, skeleton

    source = {k: options[k] for k in ("task", "dtype", "revision", "trust_remote_code") if options[k] is not None}
    output.say(f"building {model} without its weights")
    base = skeleton(model, **source)
    asked = {"rank": options["rank"], "alpha": options["alpha"], "targets": options["targets"]}

    def memory(made: AttachPlan, rows: int, length: int, checkpointed: bool) -> StepMemory:
        import torch

        output.say(f"predicting {format_shape(rows, length)}{', checkpointed' if checkpointed else ''}")
        autocast = _COMPUTE[options["compute"]]
        return made.memory(
            rows,
            length,
            optimizer=options["optimizer"],
            autocast=autocast and getattr(torch, autocast),
            device=options["device"],
            checkpointing=checkpointed or None,
        )

    return _Step(
        options["quantization"],
        options["batch_size"],
        options["sequence_length"],
        options["checkpointing"],
        lambda fmt: plan(base, **asked, quantization=fmt),
        memory,
    )


def _recipe_step(
    context: click.Context,
    path: str,
    overrides: tuple[str, ...],
    limit: int | None,
    options: dict[str, Any],
    output: Output,
) -> _Step:
    for name in options:
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name != "device":
            flag = f"--{name.replace('_', '-')}"
            raise RequestError(f"{flag} is for a model; a recipe says it itself: change it as key=value.")
    from ..recipes.reading import read_recipe
    from ..runs.runner import runner_for

    recipe = read_recipe(path, overrides)
    output.say(f"reading the data, and building {recipe.model.name} without its weights")
    runner = runner_for(recipe)
    runner.check()
    chosen = context.get_parameter_source("device") is click.core.ParameterSource.COMMANDLINE
    device = options["device"] if chosen or limit is not None else None

    def memory(made: AttachPlan, rows: int, length: int, checkpointed: bool) -> StepMemory:
        output.say(f"predicting {format_shape(rows, length)}{', checkpointed' if checkpointed else ''}")
        return runner.memory(made, rows, length, checkpointed, device)

    return _Step(
        recipe.model.quantization, *runner.shape(), recipe.training.gradient_checkpointing, runner.plan, memory
    )


def _settings(step: _Step, made: AttachPlan, limit: int) -> list[dict[str, Any]]:
    from ..budget import suggest_settings

    found = suggest_settings(
        made,
        step.planned,
        step.memory,
        limit,
        quantization=step.quantization,
        batch_size=step.batch_size,
        sequence_length=step.length,
        checkpointing=step.checkpointing,
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
    print_facts(parts, title=f"Memory of a training step, {format_shape(*shape)}")
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
