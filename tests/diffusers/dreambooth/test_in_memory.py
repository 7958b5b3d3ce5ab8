"""LoraPipeline.dreambooth: the pipeline learns, carries the adapter, and is as it was after anything that is raised."""

import sys
from pathlib import Path

import pytest
import torch
from lora_adapters_diffusers import LoraPipeline
from lora_adapters_diffusers.dreambooth.in_memory import recipe_from
from lora_adapters_diffusers.dreambooth.runner import DreamBoothRunner
from lora_adapters_diffusers.dreambooth.task import Task

from lora_adapters.errors import RequestError
from lora_adapters.recipes.reading import read_recipe
from lora_adapters.runs import loop
from lora_adapters.runs.runner import DivergedError

sys.path.insert(0, str(Path(__file__).parents[1]))
from photos import photos, write_photos
from pipelines import ENCODERS, build, close, differs, image

#: Small and quick.
OPTIONS = {
    "data": {"resolution": 16, "bucket_step": 8, "min_side": 16},
    "samples": {"count": 1, "steps": 1},
    "rank": 2,
    "learning_rate": 1e-2,
    "quiet": True,
}


def teach(lora, images=None, **options):
    pictures = photos(3, square=True) if images is None else images
    return lora.dreambooth(pictures, "a sks cat", **{**OPTIONS, "steps": 2, **options})


def state(pipe):
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        f"{name}.{key}": (
            type(module),
            module.training,
            {k: v.clone() for k, v in module.named_parameters(recurse=False)},
        )
        for name, part in parts.items()
        for key, module in part.named_modules()
    }


def same(before, after):
    assert before.keys() == after.keys()
    for key, (kind, training, values) in before.items():
        assert (kind, training) == after[key][:2], key
        assert all(torch.equal(value, after[key][2][name]) for name, value in values.items()), key


def test_it_learns_and_stays_on_the_pipeline(tmp_path):
    lora = LoraPipeline(build("sd"))
    before = image(lora.pipe)
    result = teach(lora, output=tmp_path / "run", ema=0.5, gradient_checkpointing=True)
    assert result.facts.status == "finished"
    assert result.facts.after["loss"] < result.facts.before["loss"]
    assert list(result.adapters) == ["unet"]
    assert lora.adapters == {"unet": ["default"]}
    assert not lora.denoiser.training
    assert not lora.denoiser.is_gradient_checkpointing
    made = image(lora.pipe)
    assert differs(before, made)
    # Stock diffusers and we load what was saved, and it is what the pipeline carries, averages included.
    stock = build("sd")
    stock.load_lora_weights(tmp_path / "run" / "adapter")
    close(image(stock), made)
    ours = LoraPipeline(build("sd"))
    ours.load(tmp_path / "run" / "adapter")
    close(image(ours.pipe), made)
    lora.delete("default")
    close(image(lora.pipe), before, limit=1e-7)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_other_families_with_their_text_encoders_and_the_class(kind, tmp_path):
    lora = LoraPipeline(build(kind))
    prior = {"prompt": "a cat", "images": 2, "steps": 1, "folder": str(tmp_path)}
    result = teach(lora, text_encoders=True, text_learning_rate=1e-3, prior=prior)
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert result.folder is None
    assert list(result.adapters)[1:] == ENCODERS[kind]
    assert result.facts.before != result.facts.after
    for handle in result.adapters.values():
        moved = [p for name, p in handle.base.named_parameters() if "lora_B" in name and bool(p.any())]
        assert moved, "gradients reach every component"


def test_all_that_is_raised_leaves_the_pipeline_as_it_was():
    lora = LoraPipeline(build("sd"))
    before = state(lora.pipe)
    with pytest.raises(DivergedError):
        teach(lora, optimizer="sgd", learning_rate=1e30, max_grad_norm=0.0, text_encoders=True, steps=8)
    same(before, state(lora.pipe))
    for wrong in (
        {"rnk": 2},
        {"targets": "nowhere"},
        {"images": []},
        {"images": [3]},
        {"model": {"name": "x"}},
        {"optimizer": "adamww"},
        {"timesteps": "shifted"},
        {"blocks": {"nowhere": 2}},
        {"init": "pissa"},
        {"compile": "yes"},
        {"cuda_graphs": True},  # there is no CUDA device
    ):
        with pytest.raises((RequestError, TypeError)):
            teach(lora, **wrong)
        same(before, state(lora.pipe))
    teach(lora)
    with pytest.raises(RequestError, match="give another adapter_name"):
        teach(lora)


def test_files_and_folders_are_what_images_in_memory_are(tmp_path):
    folder = write_photos(tmp_path / "photos", 3, square=True)
    losses = []
    for images in (photos(3, square=True), folder, sorted(Path(folder).iterdir())):
        losses.append(teach(LoraPipeline(build("sd")), images).facts.after)
    assert losses[0] == losses[1] == losses[2]


def test_every_key_has_its_place():
    made = recipe_from(
        {"rank": 3, "samples": {"every": 5}, "batch_size": 2, "min_snr": 5.0, "resume": True, "prior": {"images": 4}},
        {"images": "x", "prompt": None},
        "a cat",
        7,
    )
    assert made["adapter"] == {"rank": 3}
    assert made["training"] == {"batch_size": 2, "max_steps": 7}, "of the two that have it, the one that is meant"
    assert made["prior"] == {"images": 4, "prompt": "a cat"}
    assert (made["samples"], made["diffusion"], made["resume"]) == ({"every": 5}, {"min_snr": 5.0}, True)
    with pytest.raises(RequestError, match="prior and of samples: say which"):
        recipe_from({"guidance_scale": 3.0}, {}, None, None)
    with pytest.raises(RequestError, match="Did you mean 'learning_rate'"):
        recipe_from({"learn_rate": 3.0}, {}, None, None)


def test_the_run_is_the_recipes(tmp_path):
    """What is written down gives the same adapter from the command line, where the pipeline lies in a folder."""
    pipe = build("sd")
    result = teach(
        LoraPipeline(pipe),
        output=tmp_path / "run",
        class_prompt="a cat",
        prior={"images": 2, "steps": 1, "folder": str(tmp_path / "class")},
    )
    recipe = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert recipe.prior.prompt == "a cat"
    assert recipe.training.max_steps == 2
    assert {part.name: part.rows for part in result.facts.data} == {"train": 3, "eval": 3, "class": 2}


def test_the_scheduler_that_the_objective_needs():
    """PNDM can't rescale its schedule: DDIM, which can, takes its place."""
    from diffusers import PNDMScheduler

    pipe = build("sd")
    pipe.scheduler = PNDMScheduler(num_train_timesteps=100, prediction_type="v_prediction", skip_prk_steps=True)
    lora = LoraPipeline(pipe)
    result = teach(lora, zero_terminal_snr=True)
    assert pipe.scheduler.config.rescale_betas_zero_snr
    assert any("DDIMScheduler.from_config" in note for note in result.facts.notes)
    image(pipe)


@pytest.mark.parametrize(("kind", "there"), [("sd", True), ("flux", False)])
def test_flux_trains_without_cudnns_attention(kind, there, monkeypatch):
    seen, loss = [], Task.loss

    def noting(self, inputs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return loss(self, inputs)

    monkeypatch.setattr(Task, "loss", noting)
    teach(LoraPipeline(build(kind)))
    assert seen == [there, there]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_all_that_a_recorded_step_needs_is_among_its_inputs(kind, tmp_path, monkeypatch):
    """Replayed on a CPU by hand: the loss sees copies of tensors alone, and its steps are the plain ones."""
    prior = {"prompt": "a cat", "images": 2, "steps": 1, "folder": str(tmp_path)}
    options = dict(prior=prior, batch_size=2, gradient_accumulation=2, optimizer="sgd", learning_rate=0.3, steps=3)
    plain = teach(LoraPipeline(build(kind)), photos(3, square=True), **options)
    shapes = set()

    class Replayed:
        def __init__(self, loss, trained):
            self.loss = loss

        def __call__(self, inputs):
            assert all(value is None or type(value) is torch.Tensor for value in inputs.values())
            shapes.add(tuple(inputs["noisy"].shape))
            loss = self.loss({name: None if value is None else value.clone() for name, value in inputs.items()})
            loss.backward()
            return loss.detach()

    monkeypatch.setattr(loop, "GraphedLoss", Replayed)
    monkeypatch.setattr(DreamBoothRunner, "cuda_graphs", True)
    replayed = teach(LoraPipeline(build(kind)), photos(3, square=True), **options)
    assert len(shapes) == 2  # the last batch is short
    assert replayed.facts.after["loss"] == pytest.approx(plain.facts.after["loss"], rel=1e-5)
    for name, handle in replayed.adapters.items():
        for found, expected in zip(handle.parameters(), plain.adapters[name].parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
