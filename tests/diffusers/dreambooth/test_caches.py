"""Caches of latents and captions: the same bits as without, nothing stale, and what is put away comes back."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from lora_adapters_diffusers import LoraPipeline
from lora_adapters_diffusers.dreambooth.caches import CachedLatents, CachedText, encode_each
from lora_adapters_diffusers.dreambooth.families import family_of
from lora_adapters_diffusers.dreambooth.losses import Batch, drawn, eval_losses, losses, masks_of, sizes_of
from lora_adapters_diffusers.dreambooth.objective import objective_of
from lora_adapters_diffusers.dreambooth.put_away import PutAway
from lora_adapters_diffusers.recipes import Diffusion

from lora_adapters.errors import RequestError, StateError

KINDS = ("sd", "sdxl", "sd3", "flux")
CAPTIONS = ["a cat", ""]
NUMBERS = [(0, 1, 0, 0), (0, 1, 0, 1)]


@dataclass
class Example:
    pixels: torch.Tensor
    mask: torch.Tensor | None = None
    original: tuple = (40, 36)
    crop: tuple = (2, 4)
    target: tuple = (16, 24)


@pytest.fixture(scope="module")
def pipes(tiny):
    return {kind: tiny.build(kind) for kind in KINDS}


def pixels(seed=0):
    return torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


EXAMPLES = [Example(pixels(0)), Example(pixels(1), torch.full((1, 16, 24), 0.25))]


def batch(family, latents=None, text=None):
    """Return the same two images, cached or not."""
    moments = latents.moments([0, 1]) if latents else family.moments(torch.stack([e.pixels for e in EXAMPLES]))
    told = text.encode(CAPTIONS) if text else encode_each(family, CAPTIONS)
    return Batch(moments, told, sizes_of(EXAMPLES), masks_of(EXAMPLES))


def filled(family, folder=None):
    latents = CachedLatents(family, folder and folder / "latents")
    text = CachedText(family, folder and folder / "text")
    latents.fill((number, example.pixels) for number, example in enumerate(EXAMPLES))
    text.fill(CAPTIONS)
    return latents, text


def count(monkeypatch, family):
    """Return lists that grow with each image and each caption that is encoded."""
    images, captions = [], []
    moments, encode = family.moments, family.encode
    monkeypatch.setattr(family, "moments", lambda x: images.append(len(x)) or moments(x))
    monkeypatch.setattr(family, "encode", lambda x: captions.extend(x) or encode(x))
    return images, captions


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_same_to_the_bit(pipes, kind, where, tmp_path):
    family = family_of(pipes[kind])
    objective = objective_of(pipes[kind], Diffusion())
    plain = losses(family, objective, drawn(family, objective, batch(family), NUMBERS))
    latents, text = filled(family, tmp_path if where == "disk" else None)
    away = PutAway(pipes[kind], ["vae", *family.text_encoder_names], drop=True)
    away.put()
    try:
        cached = losses(family, objective, drawn(family, objective, batch(family, latents, text), NUMBERS))
    finally:
        away.back()
    assert plain.shape == (2,)
    assert plain.isfinite().all()
    assert torch.equal(cached, plain)


def test_what_is_there_is_not_encoded_again(tiny, tmp_path, monkeypatch):
    images, captions = count(monkeypatch, first := family_of(tiny.build("sd")))
    latents, text = filled(first, tmp_path)
    latents.fill([(("again", 0), pixels(0))])
    text.fill(CAPTIONS)
    assert (images, captions) == ([1, 1], CAPTIONS)
    images, captions = count(monkeypatch, later := family_of(tiny.build("sd")))
    found, said = filled(later, tmp_path)
    assert (images, captions) == ([], [])
    assert torch.equal(found.moments([0, 1])["mean"], latents.moments([0, 1])["mean"])
    assert torch.equal(said.encode(CAPTIONS)["embeds"], text.encode(CAPTIONS)["embeds"])


def test_autocast_changes_no_caption(pipes):
    family = family_of(pipes["sd"])
    with torch.autocast("cpu", torch.bfloat16):
        told = encode_each(family, CAPTIONS)["embeds"]
    assert torch.equal(told, encode_each(family, CAPTIONS)["embeds"])
    assert told.dtype == torch.float32


def change_vae(pipe):
    next(pipe.vae.parameters()).data.flatten()[-1] += 1e-3


def tile(pipe):
    pipe.vae.enable_tiling()


def change_text(pipe):
    next(pipe.text_encoder_2.parameters()).data.flatten()[-1] += 1e-3


def other_words(pipe):
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("pipelines")
        patch.setattr(module, "LETTERS", module.LETTERS[::-1])
        pipe.tokenizer = module.clip_tokenizer()


def shorter(pipe):
    pipe.tokenizer.model_max_length = pipe.tokenizer_2.model_max_length = 12


def adapt(pipe):
    LoraPipeline(pipe).attach(components=["text_encoder"], rank=2)


@pytest.mark.parametrize(
    "change, images, captions",
    [(change_vae, 2, 0), (tile, 2, 0), (change_text, 0, 2), (adapt, 0, 2), (other_words, 0, 1), (shorter, 0, 2)],
)
def test_another_model_finds_nothing(tiny, tmp_path, monkeypatch, change, images, captions):
    filled(family_of(tiny.build("sdxl")), tmp_path)
    pipe = tiny.build("sdxl")
    change(pipe)
    family = family_of(pipe)
    encoded = count(monkeypatch, family)
    filled(family, tmp_path)
    assert [len(encoded[0]), len(encoded[1])] == [images, captions]


def test_the_scale_of_an_adapter_counts(tiny, tmp_path, monkeypatch):
    pipe = tiny.build("sd")
    lora = LoraPipeline(pipe)
    lora.attach(components=["text_encoder"], rank=2)
    family = family_of(pipe)
    _, encoded = count(monkeypatch, family)
    filled(family, tmp_path)
    lora.set({"default": 0.5})
    filled(family, tmp_path)
    assert encoded == [*CAPTIONS, *CAPTIONS]


def test_another_image_under_an_old_key(tiny, tmp_path, monkeypatch):
    family = family_of(tiny.build("sd"))
    latents, _ = filled(family, tmp_path)
    changed = pixels(0)
    changed[0, 0, 0] += 1e-3
    latents.fill([(0, changed)])
    assert torch.equal(latents.moments([0])["mean"], family.moments(changed[None])["mean"])


def test_a_damaged_file_is_made_again(tiny, tmp_path, monkeypatch):
    family = family_of(tiny.build("sd"))
    latents, _ = filled(family, tmp_path)
    whole = latents.moments([0, 1])["mean"]
    files = sorted((tmp_path / "latents").iterdir())
    assert len(files) == 2
    assert all(file.suffix == ".safetensors" for file in files)
    files[0].write_bytes(files[0].read_bytes()[:-5])
    with pytest.raises(StateError, match="gone from the cache's folder"):
        latents.moments([0, 1])
    images, _ = count(monkeypatch, family)
    again, _ = filled(family, tmp_path)
    assert images == [1]
    assert torch.equal(again.moments([0, 1])["mean"], whole)


def test_errors_say_what_to_do(tiny, tmp_path):
    pipe = tiny.build("sd")
    family = family_of(pipe)
    latents, text = filled(family)
    with pytest.raises(StateError, match="image 7 is not in the cache"):
        latents.moments([0, 7])
    with pytest.raises(StateError, match="caption 'a dog' is not in the cache"):
        text.encode(["a dog"])
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="can't be written"):
        CachedLatents(family, tmp_path / "file")
    next(pipe.vae.encoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(RequestError, match="makes of image 3 values that are not finite"):
        latents.fill([(3, pixels(3))])
    next(pipe.text_encoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(RequestError, match="makes of 'b' values that are not finite"):
        text.fill(["b"])


@pytest.mark.parametrize("drop", [False, True])
def test_put_away_and_back(tiny, drop):
    pipe = tiny.build("sd")
    parts = dict(pipe.components)
    away = PutAway(pipe, ["vae", "text_encoder", "text_encoder_2"], drop)
    assert away.names == ["vae", "text_encoder"]
    away.put()
    away.put()
    assert [pipe.vae is None, pipe.text_encoder is None] == [drop, drop]
    with away.needed():
        assert pipe.vae is parts["vae"]
        assert tiny.image(pipe).isfinite().all()
    assert (pipe.vae is None) == drop
    away.back()
    away.back()
    with away.needed():
        pass
    assert pipe.components == parts


def test_a_part_that_finds_no_room_is_not_lost(tiny, monkeypatch):
    pipe = tiny.build("sd")
    parts = dict(pipe.components)
    away = PutAway(pipe, ["vae", "text_encoder"], drop=True)
    away.put()
    with monkeypatch.context() as patch:
        patch.setattr(parts["vae"], "to", lambda device: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError):
            away.back()
    assert pipe.vae is parts["vae"]
    away.back()
    assert pipe.components == parts


@pytest.mark.gpu
def test_put_away_frees_the_accelerator(tiny):
    pipe = tiny.build("sd").to("cuda")
    before = torch.cuda.memory_allocated()
    away = PutAway(pipe, ["vae", "text_encoder"])
    away.put()
    assert {p.device.type for name in away.names for p in getattr(pipe, name).parameters()} == {"cpu"}
    size = sum(p.numel() * p.element_size() for n in away.names for p in getattr(pipe, n).parameters())
    assert before - torch.cuda.memory_allocated() >= size
    with away.needed():
        assert tiny.image(pipe).isfinite().all()
    away.back()
    assert pipe.vae.device.type == pipe.text_encoder.device.type == "cuda"


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_a_masked_image_counts_less(pipes):
    family, objective = family_of(pipes["sd"]), objective_of(pipes["sd"], Diffusion())
    masked = batch(family)
    whole = Batch(masked.moments, masked.text, masked.sizes)
    some, all_ = (losses(family, objective, drawn(family, objective, b, NUMBERS)) for b in (masked, whole))
    ratio = some / all_
    torch.testing.assert_close(ratio, torch.tensor([1.0, 0.25]))  # the first has no mask, the second counts a quarter
    assert masks_of(EXAMPLES[:1]) is None


def test_sizes_in_the_order_of_sdxl():
    assert sizes_of(EXAMPLES[:1]).tolist() == [[40, 36, 2, 4, 16, 24]]


def test_eval_losses_are_always_the_same(pipes):
    pipe = pipes["sd"]
    family, objective = family_of(pipe), objective_of(pipe, Diffusion())
    numbers = [(0, 0), (0, 1)]
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    first = eval_losses(family, objective, batch(family), numbers, points=4)
    torch.manual_seed(3)
    assert torch.equal(eval_losses(family, objective, batch(family), numbers, points=4), first)
    assert pipe.unet.training
    assert not pipe.unet.mid_block.training
    assert not first.requires_grad
    other = eval_losses(family, objective, batch(family), [(1, 0), (1, 1)], points=4)
    assert not torch.equal(other, first)
    pipe.unet.eval()


def test_eval_levels_are_even(pipes, monkeypatch):
    family, objective = family_of(pipes["flux"]), objective_of(pipes["flux"], Diffusion())
    seen, predict = [], family.predict
    monkeypatch.setattr(family, "predict", lambda x, t, *rest: seen.append(t[0].item()) or predict(x, t, *rest))
    made = eval_losses(family, objective, batch(family), [(0, 0), (0, 1)], points=4)
    assert seen == [125.0, 375.0, 625.0, 875.0]
    assert made.shape == (2,)


def test_eval_has_other_noise_at_every_level(pipes, monkeypatch):
    family, objective = family_of(pipes["sd3"]), objective_of(pipes["sd3"], Diffusion())
    monkeypatch.setattr(family, "predict", lambda x, *rest: torch.zeros_like(x))  # the loss is of noise - image alone
    one, four = (eval_losses(family, objective, batch(family), [(0, 0), (0, 1)], points=p) for p in (1, 4))
    assert (one - four).abs().min() > 1e-4


def test_gradients_flow_to_adapters_alone(tiny):
    pipe = tiny.build("sd3")
    lora = LoraPipeline(pipe)
    adapter = lora.attach(rank=2)["transformer"]
    tiny.fill(lora.denoiser)
    family = family_of(pipe)
    objective = objective_of(pipe, Diffusion())
    losses(family, objective, drawn(family, objective, batch(family), NUMBERS)).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    trained = {id(p) for p in adapter.parameters()}
    rest = [p for part in (pipe.transformer, pipe.vae, pipe.text_encoder) for p in part.parameters()]
    assert all(p.grad is None for p in rest if id(p) not in trained)
