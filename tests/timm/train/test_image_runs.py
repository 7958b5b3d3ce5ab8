"""Whole runs in this process: they learn, and every setting does what it says."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pictures import TINY_VIT, write_digits
from safetensors.torch import load_file

from lora_adapters import cli
from lora_adapters.errors import LoraAdaptersError, RequestError, UnsupportedError
from lora_adapters.recipes.reading import validate
from lora_adapters.runs.progress import Progress
from lora_adapters.runs.run import train
from lora_adapters.runs.runner import runner_for


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits", 120, classes=6)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one precision for each process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run(digits, tmp_path):
    """Return a function that runs a recipe with these sections changed, and returns facts and folder."""

    def do(name="run", **changes):
        recipe = make(digits, tmp_path / name, **changes)
        return train(recipe, runner_for(recipe), Progress(quiet=True)), tmp_path / name

    return do


def make(digits, output, **changes):
    sections = {
        "task": "image-classification",
        "model": TINY_VIT,
        "adapter": {"rank": 4},
        "data": {"train": digits, "eval_fraction": 0.2, "image_size": 16},
        "augmentation": {"enabled": False},
        "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 5e-3, "log_every": 1},
        "samples": 2,
        "output": str(output),
    }
    for key, value in changes.items():
        sections[key] = {**sections[key], **value}
    return validate(sections)


def tensors(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_it_learns(run):
    facts, folder = run(training={"max_steps": None, "epochs": 20.0, "schedule": "cosine"})
    assert facts.after["accuracy"] > 0.75 > facts.before["accuracy"]
    assert facts.after["top5_accuracy"] >= facts.after["accuracy"]
    assert facts.after["loss"] < facts.before["loss"] / 2
    assert [table.title for table in facts.tables] == ["Per class", "Confusion matrix (rows: true label)"]
    counts = [row[1:] for row in facts.tables[1].rows]
    assert sum(map(sum, counts)) == 24
    assert sum(counts[i][i] for i in range(6)) == round(24 * facts.after["accuracy"])
    page = (folder / "report.html").read_text()
    assert "--share: " in page
    (first, _) = facts.samples
    assert [label for label, _ in first.parts] == ["class", "predicted, base", "predicted, adapter"]
    assert first.parts[0][1] == first.title.partition("/")[0]
    assert first.images[0][1] in page
    assert "The base has random weights" in page


def test_a_step_over_several_batches_is_that_of_one(run):
    """The last batch of the epoch is short, too."""
    whole, one = run("one", training={"batch_size": 64, "max_steps": 4})
    parts, several = run("several", training={"batch_size": 16, "gradient_accumulation": 4, "max_steps": 4})
    assert whole.epochs == parts.epochs == 2.0
    first, second = tensors(one), tensors(several)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-5)


def test_reading_processes_change_nothing(run):
    augmented = {"enabled": True, "auto_augment": "rand-m5", "mixup": 0.2}
    _, here = run("here", augmentation=augmented)
    _, there = run("there", augmentation=augmented, data={"workers": 2})
    first, second = tensors(here), tensors(there)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"precision": "bfloat16", "gradient_checkpointing": True}},
        {"model": {"dtype": "bfloat16"}},
        {"model": {"dtype": "bfloat16"}, "training": {"precision": "bfloat16"}},
        {"training": {"optimizer": "lamb", "schedule": "step", "weight_decay": 0.1, "ema": 0.5}},
        {"training": {"nan": "skip", "max_grad_norm": 0.0, "eval_every": 2}, "adapter": {"targets": "re:fc[12]$"}},
        {"model": {"timm_kwargs": {**TINY_VIT["timm_kwargs"], "in_chans": 1}}},
        {"data": {"limit": 40, "eval_limit": 10, "crop": 1.0, "check": "open"}},
    ],
)
def test_settings(run, changes):
    facts, folder = run(**changes)
    assert facts.status == "finished"
    assert facts.memory_planned["total"] > 0
    assert facts.before != facts.after
    found = tensors(folder)
    assert any(tensor.abs().max() > 0 for name, tensor in found.items() if "lora_B" in name)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_checkpointing_changes_no_gradient(run):
    _, plain = run("plain")
    _, saved = run("saved", training={"gradient_checkpointing": True})
    first, second = tensors(plain), tensors(saved)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_average_is_what_is_measured_and_saved(run, digits):
    """With a decay near 1 it stays near the start, where B is zero."""
    _, plain = run("plain")
    facts, slow = run("slow", training={"ema": 0.999})
    last, average = tensors(plain), tensors(slow)
    name = next(name for name in last if "lora_B" in name)
    assert 0 < average[name].norm() < last[name].norm()
    recipe = make(digits, slow, training={"ema": 0.999})
    runner = runner_for(recipe)
    runner.check()
    measured = runner.evaluate({"slow": slow / "adapter"}, Progress(quiet=True))
    assert measured["slow"] == pytest.approx(facts.after, rel=1e-5)
    state = torch.load(slow / "checkpoints" / "checkpoint-4" / "training.pt", weights_only=True)
    kept = load_file(slow / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    assert torch.equal(kept[name], last[name]), "a checkpoint holds the values themselves"
    assert any(
        torch.equal(one, average[name]) for one in state["ema"]["averages"].values() if one.shape == average[name].shape
    )


def test_tensorboard(run):
    pytest.importorskip("tensorboard")
    _, folder = run(training={"report_to": ["tensorboard"]})
    assert list((folder / "logs").rglob("events.out.*"))


@pytest.mark.parametrize(("scale", "skipped"), [(2.0**16, 0), (2.0**127, 1)])
def test_a_loss_scaler_skips_and_goes_on(run, monkeypatch, scale, skipped):
    """accelerate has float16's scaler on GPUs only; PyTorch's own works here, in float32."""
    from accelerate import Accelerator

    from lora_adapters.runs import loop

    class Scaled(Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-60)
            self.native_amp = True

        mixed_precision = property(lambda self: "fp16")

        def autocast(self):
            return torch.autocast("cpu", enabled=False)

    _, plain = run("plain")
    monkeypatch.setattr(loop, "Accelerator", Scaled)
    facts, folder = run("scaled")
    assert facts.skipped_steps == skipped
    assert facts.status == "finished"
    first, second = tensors(plain), tensors(folder)
    assert all(bool(tensor.isfinite().all()) for tensor in second.values())
    if not skipped:  # a power of two changes no bit of a gradient
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    state = torch.load(folder / "checkpoints" / "checkpoint-4" / "training.pt", weights_only=True)
    assert state["scaler"]["scale"] == scale * 2.0 ** (-60 * skipped)


def test_several_processes_are_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="trains in one process"):
        run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"precision": "float16"}}, "float16 needs a GPU"),
        ({"training": {"optimizer": "adamww"}}, "timm has no 'adamww'"),
        ({"augmentation": {"enabled": True, "auto_augment": "x"}}, "timm has no policy 'x'"),
        ({"data": {"labels": ["digit0", "digit1"]}}, "is none of the classes"),
        ({"model": {"timm_kwargs": {"img_sise": 3}}}, "does not take an argument"),
        ({"adapter": {"targets": "nowhere"}}, "nowhere"),
    ],
)
def test_wrong_recipes_are_refused_before_anything_is_written(run, tmp_path, changes, message):
    with pytest.raises(LoraAdaptersError, match=message):
        run(**changes)
    assert not (tmp_path / "run").exists()


def test_contradictions_are_refused_while_reading(digits, tmp_path):
    for changes, message in (
        ({"augmentation": {"enabled": False, "mixup": 1.0}}, "mixup says how to augment"),
        ({"augmentation": {"enabled": True, "scale": [0.5, 0.2]}}, "scale: give the least"),
        ({"model": {"checkpoint": "x.pth"}}, "checkpoint gives the weights"),
        ({"model": {"timm_kwargs": {"num_classes": 3}}}, "data.labels gives it"),
        ({"data": {"eval": "x"}}, "three ways to say the same"),
        ({"model": {"timm_kwargs": {"img_size": 32}}}, "other sizes"),
    ):
        with pytest.raises(RequestError, match=message):
            make(digits, tmp_path, **changes)


def test_generate_names_the_likeliest_classes(run, digits):
    _, folder = run()
    picture = min(Path(digits).rglob("*.png"))
    done = CliRunner().invoke(cli.cli, ["generate", str(folder), "--prompt", str(picture), "--json"])
    assert done.exit_code == 0, done.output
    (sample,) = json.loads(done.stdout)
    assert [name for name, _ in sample["parts"]] == ["base", "run"]
    for _, answer in sample["parts"]:
        assert answer.count("%") == 3
        assert answer.startswith("digit")
    assert sample["images"]
    done = CliRunner().invoke(cli.cli, ["generate", str(folder), "--prompt", "a cat"])
    assert isinstance(done.exception, RequestError)
    assert "a cat is no image that can be read: there is no such file" in str(done.exception)
