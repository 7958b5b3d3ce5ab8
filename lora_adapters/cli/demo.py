"""`lora-adapters demo`."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cache_folder import cache_folder
from .output import Output, output_options

if TYPE_CHECKING:
    from .demo_classification import ClassificationResult
    from .demo_images import ImageResult
    from .demo_language import LanguageModelResult

    SubjectResult = Any  # of the diffusers plugin

MIB = 2**20
#: Where the parts take less than in the benchmarks, which rest on their own settings: together five minutes on two cores.
_SHORT: dict[str, dict[str, Any]] = {
    "classification": {"train_per_class": 160},
    "language": {"prose_characters": 400_000, "code_characters": 200_000},
    "images": {"epochs": 20},
    "subject": {"steps": 150},
}


class _Lines:
    """Prints a line when a stage begins, and at each quarter of it: tidy in a terminal and in a log."""

    def __init__(self, output: Output) -> None:
        self.output, self.start, self.seen = output, time.perf_counter(), ("", -1)

    def say(self, line: str) -> None:
        self.output.say(f"[{time.perf_counter() - self.start:4.0f} s] {line}")

    def show(self, table: Callable[[], None]) -> None:
        """Print a table as soon as it is known; JSON is printed once, at the end."""
        if not self.output.as_json:
            self.output.show(None, table)

    def __call__(self, stage: str, done: int, total: int) -> None:
        quarter = 4 * done // max(1, total)
        if (stage, quarter) == self.seen or (done >= total and total == 1):
            return
        self.seen = (stage, quarter)
        self.say(f"  {stage}" + (f": {done} of {total}" if done else ""))


@click.command("demo")
@click.option("--seed", default=0, show_default=True, help="Seed of everything random.")
@output_options
def command(seed: int, output: Output) -> None:
    """Fine-tune text models, an image model and a diffusion model on this machine, in minutes. Nothing is downloaded."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ..hooks.manager import require

    require(("transformers", "timm", "diffusers", "bitsandbytes", "sklearn"), "demo", "The demo")
    lines = _Lines(output)
    lines.say("loading PyTorch, transformers, timm, diffusers and PEFT")
    from . import demo_classification, demo_images, demo_language

    with tempfile.TemporaryDirectory() as folder:
        lines.say("1. all-MiniLM-L6-v2 in NF4: which section of a reference page is this passage from?")
        settings = demo_classification.ClassificationSettings(seed=seed, **_SHORT["classification"])
        classes = demo_classification.run_classification(Path(folder), settings, lines)
        lines.show(lambda: _classification_table(classes))
        lines.say("2. a small language model, pretrained here on English, learns Python code")
        words = demo_language.run_language_model(
            Path(folder), demo_language.LanguageModelSettings(seed=seed, **_SHORT["language"]), lines
        )
        lines.show(lambda: _language_table(words))
    lines.say("3. a small residual network, pretrained here on five handwritten digits, learns the other five")
    images = demo_images.run_images(demo_images.SETTINGS["resnet"](seed=seed, **_SHORT["images"]), lines)
    lines.show(lambda: _image_table(images))
    lines.say(
        "4. DreamBooth: a small Stable Diffusion, pretrained here on nine handwritten digits, is taught the tenth"
    )
    subject = _subject(seed, lines)
    lines.show(lambda: _subject_table(subject))
    lines.say("done")
    parts = {"classification": classes, "language_model": words, "images": images, "subject": subject}
    output.show({name: asdict(part) for name, part in parts.items()}, lambda: None)


def _subject(seed: int, lines: _Lines) -> SubjectResult:
    # By name, as the core imports no plugin.
    part = importlib.import_module("lora_adapters_diffusers.demo.subject")
    return part.run_subject(
        cache_folder("demo", "subject"), part.SubjectSettings(seed=seed, **_SHORT["subject"]), lines
    )


def _table(title: str, rows: list[tuple[str, str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)


def _classification_table(result: ClassificationResult) -> None:
    rows = [
        ("accuracy, always the commonest class", f"{result.majority_accuracy:.1%}"),
        ("accuracy before (frozen encoder, nearest class centroid)", f"{result.before_accuracy:.1%}"),
        ("accuracy after LoRA on the NF4 base", f"{result.lora_accuracy:.1%}"),
        ("accuracy after full fine-tuning in fp32", f"{result.full_accuracy:.1%}"),
        ("base memory, fp32", f"{result.fp32_bytes / MIB:.1f} MiB"),
        ("base memory, NF4 (embeddings stay dense)", f"{result.nf4_bytes / MIB:.1f} MiB"),
        (
            "  of which the quantized layers",
            f"{result.linear_nf4_bytes / MIB:.1f} MiB (fp32: {result.linear_fp32_bytes / MIB:.1f})",
        ),
        ("values trained", f"{result.trainable_share:.1%}"),
        ("saved adapter", f"{result.adapter_bytes / MIB:.1f} MiB"),
        ("same predictions in stock PEFT", f"{result.peft_agreement:.1%}"),
        ("largest difference of a logit there", f"{result.peft_difference:.1e}"),
    ]
    _table(f"{result.test_size} held-out passages, {len(result.labels)} classes, {result.train_size} to train on", rows)


def _language_table(result: LanguageModelResult) -> None:
    rows = [
        ("held-out English, after pretraining", f"{result.prose_perplexity:.1f}"),
        ("held-out Python code, before", f"{result.before_perplexity:.1f}"),
        (f"held-out Python code, after LoRA ({result.trainable_share:.1%} trained)", f"{result.after_perplexity:.1f}"),
        ("the same, adapter merged into the base", f"{result.merged_perplexity:.1f}"),
    ]
    _table(f"Perplexity per token of a language model of {result.parameters / 1e6:.1f}M values", rows)


def _image_table(result: ImageResult) -> None:
    rows = [
        ("accuracy before (features as pretrained, nearest class centroid)", f"{result.before_accuracy:.1%}"),
        (f"accuracy after LoRA ({result.trained_share:.1%} trained beside the head)", f"{result.lora_accuracy:.1%}"),
        ("accuracy after LoRA on the NF4 base, convolutions included", f"{result.nf4_accuracy:.1%}"),
        ("accuracy after full fine-tuning", f"{result.full_accuracy:.1%}"),
        ("base memory, fp32", f"{result.fp32_bytes / MIB:.1f} MiB"),
        ("base memory, NF4", f"{result.nf4_bytes / MIB:.1f} MiB"),
        ("largest difference of a logit after merging", f"{result.merged_difference:.1e}"),
    ]
    _table(f"{result.test_size} held-out images of 5 new digits, {result.train_size} to train on", rows)


def _subject_table(result: SubjectResult) -> None:
    rows = [
        (f'"{result.subject_prompt}" shows it: before', f"{result.subject['before']:.0%}"),
        ("  after DreamBooth with prior preservation", f"{result.subject['with prior']:.0%}"),
        ("  after DreamBooth without", f"{result.subject['without']:.0%}"),
        (
            f'"{result.class_prompt}" shows so many different digits (effective number): before',
            f"{result.class_variety['before']:.1f}",
        ),
        ("  after, with prior preservation", f"{result.class_variety['with prior']:.1f}"),
        ("  after, without: the class is forgotten", f"{result.class_variety['without']:.1f}"),
        ("values trained", f"{result.trained_share:.1%}"),
        ("real images that the judge of samples names rightly", f"{result.judge_accuracy:.1%}"),
    ]
    _table(f"The digit {result.digit}, from {result.images} images; {result.samples} samples of each prompt", rows)
    click.echo(f"  samples: {result.picture}\n  report:  {result.reports['with prior']}")
