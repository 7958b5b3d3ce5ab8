"""DreamBooth under torchrun: two processes train the adapter that one trains with twice the gradient accumulation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_adapters.recipes.reading import dump, validate
from lora_adapters.report.facts import RunFacts
from lora_adapters.runs.folder import RunFolder
from lora_adapters.runs.progress import Progress
from lora_adapters.runs.run import train
from lora_adapters.runs.runner import runner_for

sys.path.insert(0, str(Path(__file__).parents[1]))
from photos import write_photos
from pipelines import build

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")

COMMAND = "from lora_adapters.cli import main; main()"


def recipe(folder, **training):
    return {
        "task": "dreambooth",
        "model": {"name": str(folder / "base"), "device": "cpu"},
        "adapter": {"rank": 2, "dropout": 0.2, "text_encoders": True},
        "data": {
            "images": str(folder / "photos"),
            "prompt": "a sks cat",
            "resolution": 16,
            "bucket_step": 8,
            "min_side": 16,
        },
        "prior": {"prompt": "a cat", "images": 2, "steps": 1, "folder": str(folder / "class")},
        # The last step of an epoch has one batch, which leaves the second process none.
        "training": {"epochs": 2.0, "batch_size": 1, "learning_rate": 1e-2, "log_every": 1, "ema": 0.5, **training},
        "samples": {"count": 1, "steps": 1},
    }


def launched(*arguments):
    """Run the command under torchrun with two processes."""
    left = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    script = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    return subprocess.run(
        [*script, sys.executable, "-c", COMMAND, *arguments],
        env=left | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_two_processes_are_one_with_twice_the_accumulation(tmp_path):
    build("sd").save_pretrained(tmp_path / "base")
    write_photos(tmp_path / "photos", 5, square=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(validate({**recipe(tmp_path), "output": str(tmp_path / "two")})))
    done = launched("train", str(path))
    assert done.returncode == 0, done.stderr
    alone = validate({**recipe(tmp_path, gradient_accumulation=2), "output": str(tmp_path / "one")})
    expected = train(alone, runner_for(alone), Progress(quiet=True))

    facts = RunFacts.read(tmp_path / "two" / "facts.json")
    assert (facts.status, facts.steps, facts.epochs) == ("finished", 6, 2.0)
    assert facts.after == pytest.approx(expected.after, rel=1e-5)
    losses = [[row["loss"] for row in RunFolder(tmp_path / name).history() if "loss" in row] for name in ("one", "two")]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, two = (load_file(tmp_path / n / "adapter" / "pytorch_lora_weights.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # Adam divides by the gradient's own size, so rounding in a gradient near zero shows in full.
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert done.stderr.count("6/6") == 1, "the main process alone shows its progress"
    assert done.stdout.count("trained") == 1, "and prints the result"
