"""DreamBooth teaches the small model a digit that it has never seen, from a few images and a word that it does not know."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lora_adapters.cli.demo_training import Clock, Progress, no_progress, quiet
from lora_adapters.recipes.reading import validate
from lora_adapters.runs.progress import Progress as RunProgress
from lora_adapters.runs.run import train
from lora_adapters.runs.runner import runner_for

from ..pipeline import LoraPipeline
from .base import CLASS_PROMPT, BaseSettings, pretrained_base
from .digits import SIZE, WORDS, Digits, Judge, pictures, read_digits
from .measures import share, variety

#: "sks" is three letters to the model's tokenizer, and in no caption that it was pretrained on.
SUBJECT_PROMPT = "a photo of sks digit"
#: Classifier-free guidance of samples, and of the class's images for prior preservation.
_GUIDANCE = 2.0
#: The two ways to train, and the folder of each run.
_RUNS = {"with prior": "with-prior", "without": "without-prior"}


@dataclass(frozen=True)
class SubjectSettings:
    """What is taught, and how.

    Attributes:
        base: the model.
        images: of the subject.
        prior_images: of the class, which the base makes.
        samples: of each prompt, to measure on.
        sampling_steps: denoising steps of each, and of the class's images.
        seed: draws the images, and everything random of the runs.
    """

    base: BaseSettings = field(default_factory=BaseSettings)
    images: int = 8
    prior_images: int = 64
    samples: int = 64
    sampling_steps: int = 20
    rank: int = 8
    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class SubjectResult:
    """Measured numbers. Each mapping has the entries "before", "with prior" and "without".

    Attributes:
        digit: the subject, in a word.
        subject_prompt, class_prompt: what the samples are of.
        judge_accuracy: share of held-out real images that the classifier which judges samples names rightly.
        subject: share of the subject prompt's samples that show the subject.
        class_is_subject: share of the class prompt's samples that show the subject: what the class has forgotten.
        class_variety: effective number of digits among the class prompt's samples; see `measures.variety`.
        images, prior_images, samples: as in the settings.
        parameters: values of the base.
        trained_share: values that are trained, as a share of them.
        picture: the samples, side by side.
        reports: run -> its report.html.
        seconds: stage -> seconds.
    """

    digit: str
    subject_prompt: str
    class_prompt: str
    judge_accuracy: float
    subject: dict[str, float]
    class_is_subject: dict[str, float]
    class_variety: dict[str, float]
    images: int
    prior_images: int
    samples: int
    parameters: int
    trained_share: float
    picture: str
    reports: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)


def run_subject(
    folder: str | Path, settings: SubjectSettings | None = None, progress: Progress = no_progress
) -> SubjectResult:
    """Pretrain the base if the cache folder has none, teach it the subject with and without prior preservation, and measure.

    Args:
        folder: gets the runs' folders, their images and the picture.
        settings: what is taught, and how.
        progress: called as the work goes on.
    """
    with quiet("transformers"), quiet("diffusers"):
        return _run(Path(folder), settings or SubjectSettings(), Clock(progress))


def _run(folder: Path, settings: SubjectSettings, clock: Clock) -> SubjectResult:
    data, test = read_digits(settings.base.seed)
    judge = Judge(data, test)
    base = pretrained_base(settings.base, data, clock)
    images = _write_images(folder / "images", data, settings)
    with clock.stage("Sampling the base"):
        lora = LoraPipeline(str(base))
        lora.pipe.set_progress_bar_config(disable=True)
        samples = {"before": _samples(lora.pipe, settings)}
    for name in _RUNS:
        with clock.stage(f"DreamBooth {name}"):
            recipe: Any = validate(_recipe(base, folder, name, settings))
            train(recipe, runner_for(recipe), RunProgress(quiet=True))
        lora.load(folder / _RUNS[name] / "adapter", adapter_name="subject")
        trained = sum(p.numel() for n, p in lora.denoiser.named_parameters() if "lora_" in n)
        with clock.stage(f"Sampling {name}"):
            samples[name] = _samples(lora.pipe, settings)
        lora.delete("subject")
    named = {name: [judge.name(pixels) for pixels in both] for name, both in samples.items()}
    parameters = sum(
        p.numel() for part in (lora.pipe.unet, lora.pipe.vae, lora.pipe.text_encoder) for p in part.parameters()
    )
    unseen = settings.base.unseen
    return SubjectResult(
        digit=WORDS[unseen],
        subject_prompt=SUBJECT_PROMPT,
        class_prompt=CLASS_PROMPT,
        judge_accuracy=judge.accuracy,
        subject={name: share(subject, unseen) for name, (subject, _) in named.items()},
        class_is_subject={name: share(of_class, unseen) for name, (_, of_class) in named.items()},
        class_variety={name: variety(of_class) for name, (_, of_class) in named.items()},
        images=settings.images,
        prior_images=settings.prior_images,
        samples=settings.samples,
        parameters=parameters,
        trained_share=trained / parameters,
        picture=str(_picture(folder / "samples.png", images, samples)),
        reports={name: str(folder / run / "report.html") for name, run in _RUNS.items()},
        seconds=clock.seconds,
    )


def _write_images(folder: Path, data: Digits, settings: SubjectSettings) -> Tensor:
    """Write images of the subject as files, and return them (rows, 3, SIZE, SIZE)."""
    subject = data.of([settings.base.unseen]).pixels
    order = torch.randperm(len(subject), generator=torch.Generator().manual_seed(settings.seed))
    chosen = subject[order[: settings.images]]
    shutil.rmtree(folder, ignore_errors=True)  # those of another seed
    folder.mkdir(parents=True)
    for i, picture in enumerate(pictures(chosen)):
        picture.save(folder / f"{i}.png")
    return chosen


def _recipe(base: Path, folder: Path, name: str, settings: SubjectSettings) -> dict[str, Any]:
    sampling = {"steps": settings.sampling_steps, "guidance_scale": _GUIDANCE}
    of_class = {"prompt": CLASS_PROMPT, "images": settings.prior_images, "batch_size": 32, **sampling}
    return {
        "task": "dreambooth",
        "model": {"name": str(base)},
        "adapter": {"rank": settings.rank},
        "data": {
            "images": str(folder / "images"),
            "prompt": SUBJECT_PROMPT,
            "resolution": SIZE,
            "bucket_step": 8,
            "min_side": SIZE,
        },
        **({"prior": of_class} if name == "with prior" else {}),
        "training": {
            "batch_size": settings.batch_size,
            "epochs": settings.steps,  # a pass is at least one step
            "max_steps": settings.steps,
            "learning_rate": settings.learning_rate,
            "seed": settings.seed,
        },
        "samples": {
            "prompts": [SUBJECT_PROMPT, CLASS_PROMPT],
            "every": -(-settings.steps // 3),
            "count": 4,
            **sampling,
        },
        "output": str(folder / _RUNS[name]),
        "overwrite": True,
    }


@torch.no_grad()
def _samples(pipe: Any, settings: SubjectSettings) -> tuple[Tensor, Tensor]:
    """Return samples (rows, 3, SIZE, SIZE) in [-1, 1] of the subject's and of the class's prompt, from the same noise."""

    def of(prompt: str) -> Tensor:
        # Not the seeds of the images of the class.
        generator = torch.Generator().manual_seed(2**31 + settings.seed)
        made = pipe(
            [prompt] * settings.samples,
            height=SIZE,
            width=SIZE,
            num_inference_steps=settings.sampling_steps,
            guidance_scale=_GUIDANCE,
            generator=generator,
            output_type="pt",
        )
        return 2 * made.images - 1

    return of(SUBJECT_PROMPT), of(CLASS_PROMPT)


def _picture(path: Path, images: Tensor, samples: Mapping[str, tuple[Tensor, Tensor]], columns: int = 12) -> Path:
    """Draw a row of the subject's images, and a row for each prompt and model, pixels enlarged."""
    rows = {"images of the subject": images}
    for i, prompt in enumerate((SUBJECT_PROMPT, CLASS_PROMPT)):
        rows |= {f"{prompt}\n{name}": both[i] for name, both in samples.items()}
    side, margin = 3 * SIZE, 150
    sheet = Image.new("RGB", (margin + columns * (side + 2), len(rows) * (side + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (label, pixels) in enumerate(rows.items()):
        draw.text((4, y * (side + 2) + 8), label, fill="black")
        for x, picture in enumerate(pictures(pixels[:columns])):
            enlarged = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (margin + x * (side + 2), y * (side + 2)))
    sheet.save(path)
    return path
