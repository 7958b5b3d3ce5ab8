"""The demo's diffusion part on a fraction of its steps: every number is measured, and each stage did its work."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_adapters_diffusers.demo.base import BaseSettings
from lora_adapters_diffusers.demo.digits import SIZE, read_digits
from lora_adapters_diffusers.demo.subject import SubjectSettings, _write_images, run_subject
from PIL import Image

STATES = ["before", "with prior", "without"]
SHORT = SubjectSettings(
    base=BaseSettings(vae_steps=12, steps=6, batch_size=16, vae_widths=(8, 16), widths=(16, 16)),
    images=3,
    prior_images=4,
    samples=8,
    sampling_steps=2,
    rank=2,
    steps=2,
    batch_size=2,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder, seen = tmp_path_factory.mktemp("subject"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_ADAPTERS_CACHE", str(folder / "cache"))
        result = run_subject(folder / "runs", SHORT, lambda stage, done, total: seen.append(stage))
    return folder / "runs", result, seen


def test_every_number_is_measured(done):
    _, result, seen = done
    assert result.digit == "nine"
    assert result.judge_accuracy > 0.97
    for measured in (result.subject, result.class_is_subject):
        assert list(measured) == STATES
        assert all(round(8 * value, 6).is_integer() and 0 <= value <= 1 for value in measured.values())
    assert list(result.class_variety) == STATES
    assert all(1 <= value <= 8 + 1e-6 for value in result.class_variety.values())
    assert 0 < result.trained_share < 0.2
    assert list(dict.fromkeys(seen)) == list(result.seconds)
    assert len(result.seconds) == 7


def test_what_is_written(done):
    folder, result, _ = done
    assert len(list((folder / "images").iterdir())) == SHORT.images
    assert len(list((folder.parent / "cache" / "class-images").glob("*/*.png"))) == SHORT.prior_images
    assert all(Path(report).is_file() for report in result.reports.values())
    with Image.open(result.picture) as sheet:
        assert sheet.height > 7 * 3 * SIZE  # the subject's images, two prompts before and after two runs


def test_images_of_another_seed_make_way(done):
    folder = done[0].parent / "other"
    data, _ = read_digits(seed=0)
    first = _write_images(folder, data, SHORT)
    second = _write_images(folder, data, dataclasses.replace(SHORT, images=2, seed=1))
    assert len(list(folder.iterdir())) == len(second) == 2
    assert not torch.equal(first[:2], second)
    with Image.open(folder / "0.png") as image:
        assert np.asarray(image)[..., 0] / 127.5 - 1 == pytest.approx(second[0, 0].numpy(), abs=0.005)
