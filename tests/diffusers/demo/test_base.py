"""The demo's base: Stable Diffusion in small, pretrained on what it may see, kept, and the same every time."""

import dataclasses

import pytest
import torch
from lora_adapters_diffusers.demo.base import CLASS_PROMPT, BaseSettings, build, captions, pretrained_base
from lora_adapters_diffusers.demo.digits import SIZE, Digits, read_digits
from lora_adapters_diffusers.demo.pretraining import train_autoencoder

from lora_adapters.cli.demo_training import Clock, no_progress

SHORT = BaseSettings(vae_steps=3, steps=3, batch_size=8, vae_widths=(8, 16), widths=(8, 16))


@pytest.fixture(scope="module")
def digits():
    data = read_digits(seed=0)[0]
    return Digits(data.pixels[:80], data.classes[:80])


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_ADAPTERS_CACHE", str(tmp_path))
    return tmp_path


def made(folder):
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights(pipe):
    parts = ("vae", "text_encoder", "unet")
    return {f"{part}.{name}": value for part in parts for name, value in getattr(pipe, part).state_dict().items()}


def test_it_is_kept_and_the_same_every_time(cache, digits):
    clock = Clock(no_progress)
    folder = pretrained_base(SHORT, digits, clock)
    assert list(clock.seconds) == ["Pretraining the autoencoder", "Pretraining the UNet and the text encoder"]
    assert cache in folder.parents
    first, changed = made(folder), (folder / "unet" / "config.json").stat().st_mtime_ns
    image = first(CLASS_PROMPT, height=SIZE, width=SIZE, num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, SIZE, SIZE)
    assert bool(image.isfinite().all())

    again = Clock(no_progress)
    assert pretrained_base(SHORT, digits, again) == folder
    assert again.seconds == {}
    assert (folder / "unet" / "config.json").stat().st_mtime_ns == changed

    # One that was not finished is made anew, and becomes what it was.
    (folder / "pretrained.json").unlink()
    torch.rand(3)
    second = made(pretrained_base(SHORT, digits, again))
    assert again.seconds
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("change", [{"seed": 1}, {"unseen": 3}])
def test_other_settings_are_another_base(cache, digits, change):
    folders = {pretrained_base(dataclasses.replace(SHORT, **more), digits, Clock(no_progress)) for more in ({}, change)}
    assert len(folders) == 2
    one, other = (weights(made(folder)) for folder in folders)
    assert not torch.equal(one["unet.conv_out.weight"], other["unet.conv_out.weight"])


def test_a_failure_leaves_no_folder(cache, digits, monkeypatch):
    import diffusers

    def fail(self, folder, **options):
        raise OSError("disk full")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        pretrained_base(SHORT, digits, Clock(no_progress))
    assert not list((cache / "demo").iterdir())


def test_the_unseen_digit_is_not_seen(cache, digits):
    """Other images of it make no other base, as another image of a seen digit does."""

    def first_weights(changed_digit):
        pixels = digits.pixels.clone()
        pixels[digits.classes == changed_digit] = 0
        folder = pretrained_base(SHORT, Digits(pixels, digits.classes), Clock(no_progress))
        (folder / "pretrained.json").unlink()
        return weights(made(folder))["unet.conv_in.weight"]

    assert torch.equal(first_weights(9), first_weights(-1))
    assert not torch.equal(first_weights(8), first_weights(-1))


def test_the_tokenizer_reads_known_words_whole_and_others_by_letters():
    tokenizer = build(SHORT).tokenizer
    for caption in captions():
        assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.split()]
    assert tokenizer.tokenize("a photo of sks digit") == [
        "a</w>",
        "photo</w>",
        "of</w>",
        "s",
        "k",
        "s</w>",
        "digit</w>",
    ]


def test_latents_have_a_deviation_of_one(digits):
    pipe = build(SHORT)
    train_autoencoder(pipe, digits, SHORT, Clock(no_progress))
    with torch.no_grad():
        latents = pipe.vae.encode(digits.pixels).latent_dist.mode()
    assert (latents * pipe.vae.config.scaling_factor).std().item() == pytest.approx(1, abs=1e-3)
