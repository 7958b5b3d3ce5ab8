"""`lora-adapters inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import Output, output_options, print_facts, print_table

if TYPE_CHECKING:
    from ..adapter_file import AdapterFile
    from ..inspection import AdapterFacts
    from ..portability import Verdict


@click.command("inspect")
@click.argument("path")
@click.option("--revision", help="Hub revision of the adapter.")
@click.option("--verify", is_flag=True, help="Also run the checks of restore that need no model.")
@click.option("--base", metavar="MODEL", help="Also check it against this base model's names and shapes.")
@click.option(
    "--for",
    "targets",
    type=click.Choice(["peft", "diffusers", "vllm", "comfyui", "timm"]),
    multiple=True,
    help="Say whether it loads there and why not; exit status 1 if not. May be given several times.",
)
@click.option(
    "--max-lora-rank",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="What the vLLM engine is started with.",
)
@output_options
def command(
    path: str,
    revision: str | None,
    verify: bool,
    base: str | None,
    targets: tuple[str, ...],
    max_lora_rank: int,
    output: Output,
) -> None:
    """Show what the adapter in PATH (a folder, a file, or a Hub name) holds, check it, and say where it loads.

    Knows PEFT folders, and the files of diffusion models' adapters: diffusers, kohya, LyCORIS, ai-toolkit. A damaged file is
    an error. No weight of a base model is read.
    """
    place = Path(path).expanduser()
    if is_portable(place):
        facts, checks, verdicts = _portable(place, verify, base, targets, output)
    else:
        facts, checks, verdicts = _peft(path, revision, verify, base, targets, max_lora_rank, output)
    found: dict[str, Any] = asdict(facts)
    if checks:
        found["checks"] = checks
    if verdicts:
        found["for"] = {v.target: {"loads": v.loads, "reasons": v.reasons, "notes": v.notes} for v in verdicts}
    output.show(found, lambda: _print(facts, checks, verdicts))
    if not all(verdict.loads for verdict in verdicts):
        raise click.exceptions.Exit(1)


def is_portable(path: Path) -> bool:
    """Return True for what is no single PEFT folder of LoRA: a file, a folder with one, a PEFT folder for each component.

    A folder of PEFT's LoHa or LoKr layers is one too: they are read into what diffusion models' files hold.
    """
    from ..adapter_config import CONFIG_NAME, WEIGHTS_NAME
    from ..adapter_file import peft_type_of

    if not path.is_dir():
        return path.is_file() and path.suffix == ".safetensors"
    if (path / CONFIG_NAME).is_file() and peft_type_of(path) in ("LOHA", "LOKR"):
        return True
    if any((path / name).exists() for name in (CONFIG_NAME, WEIGHTS_NAME)):
        return False
    folders = [config.parent.name for config in path.glob(f"*/{CONFIG_NAME}")]
    components = all(name.startswith(("unet", "transformer", "text_encoder")) for name in folders)
    return components if folders else any(path.glob("*.safetensors"))


def _portable(
    path: Path, verify: bool, base: str | None, targets: tuple[str, ...], output: Output
) -> tuple[AdapterFacts, list[str], list[Verdict]]:
    from ..errors import UnsupportedError
    from ..formats import detect, read
    from ..image_file_portability import judge_portable
    from ..image_inspection import describe_portable

    if base is not None:
        raise UnsupportedError(
            f"{path} is no PEFT folder, and only those are checked against a base. Leave out --base."
        )
    output.say("reading the adapter")
    format, adapter = detect(path), read(path)
    checks = [
        "header: keys, shapes, dtypes and ranks, every key of a known layer",
        "values: finite",
        "digest: none in the file, so whether its values are those that were saved can't be told",
    ]
    verdicts = [judge_portable(adapter, path, format, target) for target in dict.fromkeys(targets)]
    return describe_portable(adapter, path, format), checks if verify else [], verdicts


def _peft(
    path: str,
    revision: str | None,
    verify: bool,
    base: str | None,
    targets: tuple[str, ...],
    max_lora_rank: int,
    output: Output,
) -> tuple[AdapterFacts, list[str], list[Verdict]]:
    from ..checkpoint import inspect_adapter, read_adapter, resolve_adapter_path
    from ..inspection import describe, skeleton_for
    from ..portability import judge

    file = inspect_adapter(resolve_adapter_path(path, revision))
    output.say("reading the adapter")
    facts = describe(file, read_adapter(file))
    model = None
    if base is not None:
        output.say("building the base model without its weights")
        model = skeleton_for(file, base)
    checks = _verify(file, model) if verify or base is not None else []
    return facts, checks, [judge(file, target, model, max_lora_rank) for target in dict.fromkeys(targets)]


def _verify(file: AdapterFile, model: Any) -> list[str]:
    """Run the checks that come after reading a file; return what was checked, reading included."""
    from ..checkpoint import check_supported

    check_supported(file)
    checks = [
        "config: fields, types and bounds",
        "header: keys, shapes, dtypes and ranks, and that they are the config's",
        "values: finite",
        "digest: the values are those that were saved"
        if file.verifiable
        else "digest: none in the file, so whether its values are those that were saved can't be told",
        "variant: can be restored here",
    ]
    if model is not None:
        from ..saving import checked_plan

        checked_plan(model, file)
        checks.append(f"base: every name and shape is that of this {type(model).__name__}")
        if file.copies:
            checks.append("base: the file's copies of base weights were not compared, which takes the weights")
    return checks


def _print(facts: AdapterFacts, checks: list[str], verdicts: list[Verdict]) -> None:
    print_facts(_rows(facts), title=facts.folder)
    if facts.groups:
        rows = [
            (g.name, g.kind, str(g.count), _several(g.ranks), _several(g.alphas), _several(g.scalings), f"{g.values:,}")
            for g in facts.groups
        ]
        print_table(rows, ("layer", "kind", "count", "rank", "alpha", "scaling", "values"), title="Adapted layers")
    if facts.norms:
        dora = ", before DoRA's magnitudes" if "DoRA" in facts.variants else ""
        rows = [("mean", f"{facts.norms.mean:.4g}")]
        rows += [(name, f"{norm:.4g}") for name, norm in facts.norms.largest]
        print_table(rows, ("layer", "norm"), title=f"Norm of scaling * B @ A{dora}: the mean, and the largest")
    if checks:
        print_table([(check,) for check in checks], title="Checked")
    for verdict in verdicts:
        rows = [("because", reason) for reason in verdict.reasons] + [("note", note) for note in verdict.notes]
        print_table(rows, title=f"Loads in {verdict.target}: {'yes' if verdict.loads else 'no'}")


def _rows(facts: AdapterFacts) -> dict[str, str]:
    from ..budget import format_size

    base = [
        facts.base_model or "not named",
        facts.base_revision and f"revision {facts.base_revision}",
        facts.base_class,
    ]
    rows = {
        "base model": ", ".join(part for part in base if part),
        "format": facts.format,
        "written by": facts.written_by,
        "digest": "verified" if facts.digest else "none: can't be told whether its values are those that were saved",
        "type": ", ".join((facts.peft_type, *facts.variants)),
        "task": facts.task_type or "not named",
        "adapted layers": str(facts.layers),
        "trained whole": ", ".join(facts.trained_whole),
        "biases of the base": f"{facts.bias}, {facts.biases} trained" if facts.bias != "none" else "",
        "token rows of": ", ".join(facts.token_rows),
        "copies of base weights": ", ".join(facts.base_copies),
        "values": f"{facts.values:,}",
        "dtype": ", ".join(facts.dtypes)
        if len(facts.dtypes) == 1
        else ", ".join(f"{dtype} ({count:,})" for dtype, count in facts.dtypes.items()),
        "file size": format_size(facts.file_bytes),
    }
    return {name: value for name, value in rows.items() if value}


def _several(values: tuple[float, ...]) -> str:
    shown = [f"{value:g}" for value in values]
    return ", ".join(shown) if len(shown) <= 4 else f"{shown[0]} to {shown[-1]} ({len(shown)} values)"
