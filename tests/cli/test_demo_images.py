"""The demo's image part on a fraction of its steps: every number is measured, and each stage did its work."""

import math

import pytest

from lora_adapters.cli.demo_images import SETTINGS, run_images


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_run_images(family):
    short = {"pretraining_epochs": 1, "epochs": 4, "test_share": 0.5, "batch_size": 64, "learning_rate": 1e-2}
    seen = []
    result = run_images(SETTINGS[family](**short), lambda stage, done, total: seen.append(stage))
    assert result.family == family
    assert result.train_size + result.test_size == 896
    # Five classes: chance is 20 %. So few steps do little for a transformer that has seen next to nothing.
    floor = {"resnet": 0.4, "vit": 0.27}[family]
    assert min(result.lora_accuracy, result.nf4_accuracy, result.full_accuracy) > floor
    assert 0 < result.trained_share <= 0.05
    assert result.nf4_bytes < 0.25 * result.fp32_bytes == result.values
    assert result.merged_difference < 1e-3
    assert math.isfinite(result.pretraining_accuracy + result.before_accuracy)
    assert list(dict.fromkeys(seen)) == list(result.seconds)
