"""Class images: generated once, each by its seed, found again, and the pipeline is as it was."""

import copy

import pytest
import torch
from lora_adapters_diffusers import LoraPipeline
from lora_adapters_diffusers.dreambooth.prior import class_images
from lora_adapters_diffusers.recipes import Prior
from PIL import Image

from lora_adapters.errors import RequestError, StateError, UnsupportedError
from lora_adapters.runs.progress import Progress

PROMPT = "a dog"


@pytest.fixture(scope="module")
def pipe(tiny):
    return tiny.build("sd")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_ADAPTERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Told(Progress):
    """Remembers what it is told."""

    def __init__(self, stop_after=None):
        super().__init__(quiet=True)
        self.lines, self.done, self.stop_after = [], [], stop_after

    def say(self, line):
        self.lines.append(line)

    def update(self, done, **values):
        self.done.append(done)
        if done == self.stop_after:
            raise KeyboardInterrupt


def make(pipe, seed=0, progress=None, resolution=16, **options):
    prior = Prior(**{"prompt": PROMPT, "images": 5, "batch_size": 2, "steps": 2, **options})
    return class_images(pipe, prior, resolution=resolution, seed=seed, progress=progress or Told())


def content(items):
    return [item.source.read_bytes() for item in items]


def test_images_are_generated_into_the_cache_and_found_there(pipe, cache):
    progress = Told()
    items = make(pipe, progress=progress)
    assert progress.done == [2, 4, 5]
    assert [(item.caption, item.prior, item.size) for item in items] == [(PROMPT, True, (16, 16))] * 5
    assert len({item.digest for item in items}) == 5
    assert all(item.source.is_relative_to(cache / "class-images") for item in items)

    again = Told()
    assert content(make(pipe, progress=again)) == content(items)
    assert again.done == []
    assert content(make(pipe, images=3)) == content(items)[:3]  # fewer: the first
    more = Told()
    assert content(make(pipe, images=6, progress=more))[:5] == content(items)
    assert more.done == [1]


def test_an_image_is_what_its_seed_gives(pipe):
    """And so is what stock code makes of that seed, in a batch of that size."""
    first = make(pipe)
    assert [item.source.stem[-10:] for item in first] == [f"{i:010}" for i in range(5)]
    generators = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
    stock = copy.deepcopy(pipe)([PROMPT] * 2, height=16, width=16, num_inference_steps=2, generator=generators).images
    assert [image.tobytes() for image in stock] == [item.open()[0].tobytes() for item in first[2:4]]
    # Images of seeds that two runs share are taken from the other, and the rest are made.
    progress = Told()
    assert content(make(pipe, seed=2, progress=progress))[:3] == content(first)[2:]
    assert progress.done[-1] == 2


def test_each_setting_reaches_the_pipeline(pipe):
    settings = ({}, {"prompt": "a cat"}, {"steps": 3}, {"guidance_scale": 1.5}, {"seed": 9})
    made = [make(pipe, **{"images": 1, **options})[0].digest for options in settings]
    assert len(set(made)) == len(settings)
    assert make(pipe, images=1, resolution=32)[0].size == (32, 32)


def test_a_folder_that_can_not_be_made_is_told_before_anything_is_generated(pipe, tmp_path):
    (tmp_path / "file").touch()
    progress = Told()
    with pytest.raises(RequestError, match=r"prior: .*file.inside can't be made"):
        make(pipe, folder=str(tmp_path / "file" / "inside"), progress=progress)
    assert progress.done == []


@pytest.mark.parametrize("folder", [False, True])
def test_a_run_that_was_killed_goes_on_to_the_same_files(pipe, tmp_path, folder):
    options = {"folder": str(tmp_path / "whole")} if folder else {}
    whole = make(pipe, seed=1, **options)
    expected = content(whole)
    place = whole[0].source.parent
    for path in place.iterdir():
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        make(pipe, seed=1, progress=Told(stop_after=1), **options)
    assert len(list(place.glob("*.png"))) == 1
    (place / ".class-x.png.lora_adapters-saving-1").mkdir()  # what a kill while writing leaves
    whole[3].source.write_bytes(expected[3])  # and one out of the middle of a batch
    progress = Told()
    assert content(make(pipe, seed=1, progress=progress, **options)) == expected
    assert progress.done[-1] == 3


def test_own_images_count_and_come_first(pipe, tmp_path):
    for name in ("z.png", "a.jpg"):
        Image.new("RGB", (40, 30), "green").save(tmp_path / name)
    items = make(pipe, folder=str(tmp_path))
    assert [item.source.name for item in items[:2]] == ["a.jpg", "z.png"]
    assert [item.source.stem[-1] for item in items[2:]] == ["0", "1", "2"]
    progress = Told()
    assert [item.source.name for item in make(pipe, images=1, folder=str(tmp_path), progress=progress)] == ["a.jpg"]
    assert progress.done == []
    assert "4 images are not taken" in progress.lines[0]
    (tmp_path / "broken.png").touch()
    with pytest.raises(RequestError, match=r"prior\.folder: .*\n.*broken\.png: it is empty"):
        make(pipe, folder=str(tmp_path))


def test_what_images_follow_from_names_them_anew(pipe, tmp_path):
    def names(one=pipe, **options):
        return [item.source.name for item in make(one, images=1, folder=str(tmp_path), **options)]

    first = names()
    assert names() == names(batch_size=1) == first
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        other.unet.conv_out.weight.add_(0.01)
    found = [names(prompt="a cat"), names(steps=1), names(guidance_scale=2.0), names(resolution=32), names(other)]
    slower = copy.deepcopy(pipe)
    slower.scheduler.register_to_config(beta_end=0.5)
    found.append(names(slower))
    assert len({*map(tuple, found), tuple(first)}) == 7
    progress = Told()
    names(progress=progress)
    assert "6 images are not taken: more than prior.images, or made by another base or seed" in progress.lines[0]


def test_the_pipeline_is_as_it_was(pipe):
    pipe = copy.deepcopy(pipe)
    items = make(pipe)
    expected = content(items)
    for item in items:
        item.source.unlink()
    dropouts = [module for module in pipe.unet.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    for dropout in dropouts:
        dropout.p = 0.5
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.scheduler.set_timesteps(7)
    pipe.set_progress_bar_config(desc="mine")
    scheduler, timesteps = pipe.scheduler, pipe.scheduler.timesteps.clone()
    modes = [module.training for module in pipe.unet.modules()]
    torch.manual_seed(5)
    random = torch.get_rng_state()
    assert content(make(pipe)) == expected
    assert pipe.scheduler is scheduler
    assert torch.equal(scheduler.timesteps, timesteps)
    assert [module.training for module in pipe.unet.modules()] == modes
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(KeyboardInterrupt):
        make(pipe, seed=50, progress=Told(stop_after=2))
    assert pipe.scheduler is scheduler
    assert [module.training for module in pipe.unet.modules()] == modes


def test_adapters_are_off_meanwhile(pipe, tiny):
    expected = content(make(pipe))
    lora = LoraPipeline(copy.deepcopy(pipe))
    lora.attach(rank=2, components=["unet", "text_encoder"])
    tiny.fill(lora.denoiser, size=1.0)
    adapted = tiny.image(lora.pipe)
    assert tiny.differs(adapted, tiny.image(pipe))
    progress = Told()
    assert content(make(lora.pipe, progress=progress)) == expected  # found: the base is the same
    assert progress.done == []
    for path in {item.source for item in make(lora.pipe)}:
        path.unlink()
    grads = [p.requires_grad for p in lora.denoiser.parameters()]
    assert content(make(lora.pipe)) == expected  # made
    assert [p.requires_grad for p in lora.denoiser.parameters()] == grads
    assert torch.equal(tiny.image(lora.pipe), adapted)
    lora.fuse()
    with pytest.raises(StateError, match="unfuse it first"):
        make(lora.pipe)


def test_blank_images_are_not_taken(pipe):
    pipe = copy.deepcopy(pipe)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.fill_(float("nan"))
    with pytest.raises(RequestError, match="the class image of seed 0 is blank: the pipeline's safety checker"):
        make(pipe)


def test_a_base_that_can_not_be_told_from_others_is_refused(pipe):
    with pytest.raises(UnsupportedError, match="is offloaded"):
        offloaded = copy.deepcopy(pipe)
        offloaded.unet.to("meta")
        make(offloaded)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_every_family(kind, tiny):
    items = make(tiny.build(kind), images=1, batch_size=1, steps=1)
    assert items[0].size == (16, 16)
