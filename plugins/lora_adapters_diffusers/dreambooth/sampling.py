"""Images made while training, always from the same prompts and seeds, as files and for the report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from lora_adapters.modes import modes_kept
from lora_adapters.pictures import png
from lora_adapters.report.facts import Sample
from lora_adapters.runs.folder import SAMPLES

if TYPE_CHECKING:
    from lora_adapters.runs.runner import Run

    from ..recipes import Samples
    from .family import Family
    from .put_away import PutAway

#: Width of an image in the report.
_SHOWN = 192


class Sampler:
    """Makes the images.

    Args:
        family: of the pipeline.
        section: the recipe's.
        prompts: what the images are of.
        side: pixels a side, where the section does not say it.
        away: parts of the pipeline that may be put away; None if none are.
    """

    def __init__(
        self, family: Family, section: Samples, prompts: Sequence[str], side: int, away: PutAway | None = None
    ) -> None:
        self.family, self.section, self.prompts, self.away = family, section, list(prompts), away
        self.size = {"height": section.height or side, "width": section.width or side}

    def images(self) -> list[list[Image.Image]]:
        """Return `count` images of each prompt, made by the pipeline as it is now.

        Each is made by itself, so that it depends on its seed alone, and without autocast, as users of the adapter will.
        """
        with self._ready():
            return [[self._image(prompt, i) for i in range(self.section.count)] for prompt in self.prompts]

    def record(self, run: Run, step: int, what: str = "") -> None:
        """Make the images, write them to the run's folder and add them to its samples.

        Args:
            run: the run.
            step: steps that are done.
            what: "base" or "adapter" before and after training.
        """
        if not self.section.count:
            return
        run.progress.say(f"making images of {len(self.prompts)} prompts")
        facts, label = run.facts, f"step {step}, {what}" if what else f"step {step}"
        if [sample.title for sample in facts.samples] != self.prompts:
            facts.samples = [Sample(prompt) for prompt in self.prompts]
        folder = run.folder.path / SAMPLES / f"step-{step:06}{'-base' if what == 'base' else ''}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, (sample, images) in enumerate(zip(facts.samples, self.images(), strict=True), 1):
            for i, image in enumerate(images, 1):
                image.save(folder / f"prompt-{number}-image-{i}.png")
            sample.images.append((label, column(images)))

    def _image(self, prompt: str, index: int) -> Image.Image:
        section = self.section
        given: dict[str, Any] = {"negative_prompt": section.negative_prompt, "guidance_scale": section.guidance_scale}
        given["max_sequence_length"] = getattr(self.family, "max_sequence_length", None)
        return self.family.pipe(
            prompt,
            num_inference_steps=section.steps,
            generator=torch.Generator().manual_seed(section.seed + index),
            **self.size,
            **{name: value for name, value in given.items() if value is not None},
        ).images[0]

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Within this context all of the pipeline is there and in evaluation mode, and it shows no bars."""
        pipe = self.family.pipe
        bars = getattr(pipe, "_progress_bar_config", {})
        parts = self.family.models()
        pipe.set_progress_bar_config(**{**bars, "disable": True})
        try:
            with modes_kept(parts), self.away.needed() if self.away is not None else nullcontext():
                parts.eval()
                yield
        finally:
            pipe.set_progress_bar_config(**bars)


def column(images: Sequence[Image.Image]) -> str:
    """Return images one below the other, as PNG in base64: with those of other steps beside it a grid over time."""
    small = [image.convert("RGB").resize((_SHOWN, round(_SHOWN * image.height / image.width))) for image in images]
    made = Image.new("RGB", (_SHOWN, sum(image.height for image in small)))
    top = 0
    for image in small:
        made.paste(image, (0, top))
        top += image.height
    return png(made, max(made.size))


def forget_after(samples: Sequence[Sample], step: int) -> None:
    """Take away images of later steps: a resumed run makes them again."""
    for sample in samples:
        sample.images = [(label, data) for label, data in sample.images if _step_of(label) <= step]


def _step_of(label: str) -> int:
    found = re.match(r"step (\d+)", label)
    return int(found[1]) if found else 0


def write_images(folder: Path, name: str, images: Sequence[Image.Image]) -> list[Path]:
    """Write images as files of a folder; return their paths."""
    paths = [folder / f"{name}-{i}.png" for i in range(1, len(images) + 1)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return paths
