"""Buckets and batches: sizes, who goes where, what is taken of an image, and in which order."""

import math
import pickle
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_adapters_diffusers.dreambooth.batches import Batches, unchanging
from lora_adapters_diffusers.dreambooth.buckets import bucket_sizes, nearest, to_pixels, view_of
from lora_adapters_diffusers.dreambooth.draws import Use, draws
from lora_adapters_diffusers.dreambooth.images import read_subject
from lora_adapters_diffusers.dreambooth.items import Item
from lora_adapters_diffusers.recipes import SubjectData
from PIL import Image
from sklearn.datasets import load_sample_image

from lora_adapters.errors import LoraAdaptersWarning, RequestError

steps = st.sampled_from([8, 16, 24, 64])
sides = st.integers(1, 5000)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@given(st.integers(64, 1100), steps, st.sampled_from([2, 8, 16, 32]), st.floats(1, 4))
@settings(max_examples=60, deadline=None)
def test_sizes_have_as_many_pixels_as_steps_allow(resolution, step, multiple, aspect):
    unit = math.lcm(step, multiple)
    if resolution < unit:
        with pytest.raises(RequestError, match="less than one step"):
            bucket_sizes(resolution, step, multiple, aspect)
        return
    sizes = bucket_sizes(resolution, step, multiple, aspect)
    square = resolution // unit * unit
    assert (square, square) in sizes
    assert len(set(sizes)) == len(sizes)
    assert sizes == sorted(sizes, key=lambda size: size[1] / size[0])
    for height, width in sizes:
        assert height % unit == width % unit == 0
        assert (width, height) in sizes
        assert height * width <= resolution**2
        assert max(height, width) <= aspect * min(height, width)
        if height != width:
            assert (min(height, width) + unit) * max(height, width) > resolution**2
            assert (max(height, width) + unit) * min(height, width) > resolution**2


def test_sizes_of_stable_diffusion():
    wide = [(512, 512), (448, 576), (384, 640)]
    assert [size for size in bucket_sizes(512, 64, 8, 2) if size[1] >= size[0]] == wide
    assert bucket_sizes(1024, 64, 8, 1) == [(1024, 1024)]
    assert (832, 1216) in bucket_sizes(1024, 64, 8, 2)  # of SDXL's own table (arXiv:2307.01952, appendix I)
    with pytest.raises(RequestError, match=r"data\.resolution=40 is less than one step of 64 pixels"):
        bucket_sizes(40, 64, 8, 2)


@given(sides, sides)
@settings(max_examples=60, deadline=None)
def test_the_nearest_shape_is_nearest_and_symmetric(height, width):
    sizes = bucket_sizes(512, 64, 8, 2)
    found = nearest((height, width), sizes)
    distance = [abs(math.log(width * h / (height * w))) for h, w in sizes]
    assert abs(math.log(width * found[0] / (height * found[1]))) == pytest.approx(min(distance))
    assert nearest((100, 100), sizes) == (512, 512)


# ---- views -----------------------------------------------------------------------------------------------------------


@given(sides, sides, st.sampled_from(bucket_sizes(256, 64, 8, 2)), st.integers(0, 9), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_view_covers_its_bucket_and_keeps_the_shape(height, width, target, seed, random_crop):
    view = view_of((height, width), target, draws(Use.PICTURE, seed), random_crop=random_crop, flip=0.5)
    spare = [r - t for r, t in zip(view.resized, target, strict=True)]
    assert min(spare) == 0
    assert all(0 <= corner <= room for corner, room in zip(view.crop, spare, strict=True))
    assert abs(view.resized[0] / height - view.resized[1] / width) <= max(1 / height, 1 / width)
    if not random_crop:
        assert view.crop == (spare[0] // 2, spare[1] // 2)


def photo():
    return Image.fromarray(load_sample_image("china.jpg")).resize((320, 214))


def test_pixels_are_those_of_the_resized_image():
    view = view_of((214, 320), (64, 64), draws(Use.PICTURE, 0), random_crop=False, flip=0)
    assert view.resized == (64, 96)
    assert view.crop == (0, 16)
    pixels = to_pixels(view.of(photo()))
    assert (pixels.shape, pixels.dtype) == ((3, 64, 64), torch.float32)
    whole = np.asarray(photo().resize((96, 64), Image.Resampling.LANCZOS), dtype=np.float32)
    assert np.allclose((pixels.permute(1, 2, 0) + 1) * 127.5, whole[:, 16:80], atol=1e-4)
    assert pixels.min() < -0.5
    assert pixels.max() > 0.5


def test_a_mirrored_crop_is_told_by_its_corner_in_the_mirrored_image():
    found = [view_of((214, 320), (64, 64), draws(Use.PICTURE, seed), random_crop=True, flip=0.5) for seed in range(40)]
    mirrored = np.asarray(photo().resize((96, 64), Image.Resampling.LANCZOS))[:, ::-1]
    flipped = [view for view in found if view.flipped]
    assert 10 < len(flipped) < 30
    assert len({view.crop for view in found}) > 15
    for view in flipped[:4]:
        left = view.crop[1]
        assert np.array_equal(np.asarray(view.of(photo())), mirrored[:, left : left + 64])


# ---- batches ---------------------------------------------------------------------------------------------------------


def items(*sizes, prior=False):
    return [
        Item(f"{i}", Image.new("RGB", s, (i, 0, 0)), f"caption {i}", None, prior, s, f"{prior}{i}")
        for i, s in enumerate(sizes)
    ]


SIZES = [(64, 64)] * 5 + [(100, 60)] * 3 + [(60, 100)] * 2


def batches(subject=None, prior=(), batch_size=2, seed=0, **options):
    data = SubjectData(**{"images": "unused", "prompt": "unused", "bucket_step": 16, **options})
    return Batches(
        items(*SIZES) if subject is None else subject,
        data,
        batch_size=batch_size,
        seed=seed,
        resolution=64,
        multiple=8,
        prior=prior,
    )


@pytest.mark.filterwarnings("ignore:More than half")
@given(
    st.lists(st.tuples(sides, sides), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5)
)
@settings(max_examples=60, deadline=None)
def test_every_image_comes_once_in_batches_of_one_bucket(sizes, batch_size, repeats, epoch):
    made = batches(
        [Item(f"{i}", photo, "", size=size) for i, size in enumerate(sizes)], (), batch_size, repeats=repeats
    )
    keys = made.keys(epoch)
    assert len(keys) == len(made)
    assert sum(made.counts.values()) == len(sizes)
    for batch in keys:
        assert 0 < len(batch) <= batch_size
        assert len({made.view(key).target for key in batch}) == 1
    flat = [key for batch in keys for key in batch]
    assert len(set(flat)) == len(flat) == repeats * len(sizes)
    assert Counter(number for _, number in flat) == dict.fromkeys(range(len(sizes)), repeats)
    others = {key for batch in made.keys(epoch + 1) for key in batch}
    assert not others & set(flat)


def test_the_order_follows_from_the_seed_and_the_epoch():
    def numbers(seed, epoch):
        return [[number for _, number in batch] for batch in batches(seed=seed).keys(epoch)]

    torch.manual_seed(1)
    first = numbers(0, 0)
    torch.manual_seed(2)
    assert numbers(0, 0) == first
    assert len({str(numbers(0, epoch)) for epoch in range(5)}) == 5
    assert len({str(numbers(seed, 0)) for seed in range(5)}) == 5
    # Batches of different buckets are mixed, and so are the images of one.
    targets = [str([batches().view(b[0]).target for b in batches().keys(epoch)]) for epoch in range(5)]
    assert len(set(targets)) > 1


def test_without_buckets_all_are_square():
    assert set(batches().counts) == {(64, 64), (48, 80), (80, 48)}
    assert batches(buckets=False).counts == {(64, 64): 10}
    assert batches(buckets=False, resolution=32).counts == {(32, 32): 10}
    assert set(batches(bucket_step=8).counts) == {(64, 64), (48, 80), (80, 48)}
    assert batches(bucket_step=32).counts == {(64, 64): 10}, "no other shape has sides of whole steps"
    with pytest.raises(RequestError, match="no images to train on"):
        batches([])


def test_a_random_crop_is_another_each_time():
    corners = [{batches(buckets=False, crop=c).view((e, 5)).crop for e in range(9)} for c in ("center", "random")]
    assert corners[0] == {(0, 21)}
    assert len(corners[1]) > 3


def test_images_of_which_little_would_be_left_are_a_warning():
    with pytest.warns(LoraAdaptersWarning, match=r"half is cropped away of: 1\. "):
        batches(items((200, 64), (64, 280)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches(items((200, 64), (64, 280)), max_aspect=4.0)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_images_of_the_class_come_beside_each_batch_in_its_size(count):
    """As many as of the subject, in the same bucket, each as often as the others."""
    made = batches(prior=items(*[(64, 64)] * count, prior=True), flip=0.5)
    taken, seen = Counter(), set()
    for epoch in range(4):
        for batch in made.keys(epoch):
            halves = batch[: len(batch) // 2], batch[len(batch) // 2 :]
            assert [[made.item(key).prior for key in half] for half in halves] == [
                [False] * len(halves[0]),
                [True] * len(halves[0]),
            ]
            assert len({made.view(key).target for key in batch}) == 1
            taken.update(made.item(key).name for key in halves[1])
            assert not seen & set(halves[1])
            seen |= set(halves[1])
    assert sum(taken.values()) == 40
    assert len(taken) == min(count, 40)
    assert set(taken.values()) == {40 // count} if 40 % count == 0 else max(taken.values()) - min(taken.values()) <= 1
    assert [[k for k in b if not made.item(k).prior] for b in made.keys(2)] == batches().keys(2)


def test_an_example_has_all_that_training_needs(tmp_path):
    image = photo()
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, 160, 214))
    image.putalpha(mask)
    image.save(tmp_path / "a.png")
    data = SubjectData(images=str(tmp_path), prompt="sks", masks="alpha", mask_floor=0.25, flip=0.5, bucket_step=16)
    prior = items((64, 64), prior=True)
    made = Batches(read_subject(data), data, batch_size=1, seed=0, resolution=64, multiple=8, prior=prior)
    flipped = set()
    for epoch in range(8):
        first, second = (made.example(key) for key in made.keys(epoch)[0])
        view = made.view(made.keys(epoch)[0][0])
        flipped.add(view.flipped)
        assert (first.pixels.shape, first.mask.shape, first.mask.dtype) == ((3, 48, 80), (1, 48, 80), torch.float32)
        assert (first.original, first.crop, first.target) == ((214, 320), (3, 0), (48, 80))
        assert (first.caption, first.prior) == ("sks", False)
        weights = first.mask[0, 20].tolist()
        assert (weights[0], weights[-1]) == ((0.25, 1.0) if view.flipped else (1.0, 0.25))
        expected = to_pixels(view.of(photo()))
        assert torch.equal(first.pixels, expected)
        assert (second.mask, second.caption, second.prior) == (None, "caption 0", True)
        assert second.target == (48, 80)
    assert flipped == {True, False}


def test_the_same_key_gives_the_same_example_in_other_processes(tmp_path):
    photo().save(tmp_path / "a.png")
    options = dict(crop="random", flip=0.5, shuffle_tags=True, prompt="a, b, c, d")
    data = SubjectData(images=str(tmp_path), bucket_step=16, **options)
    made = Batches(read_subject(data), data, batch_size=1, seed=0, resolution=64, multiple=8)
    other = pickle.loads(pickle.dumps(made))
    examples = [made.example((epoch, 0)) for epoch in range(6)]
    for epoch in reversed(range(6)):
        again = other[(epoch, 0)]
        assert torch.equal(again.pixels, examples[epoch].pixels)
        assert (again.caption, again.crop) == (examples[epoch].caption, examples[epoch].crop)
    assert len({(e.caption, e.crop) for e in examples}) > 3


def test_the_fingerprint_of_a_view_changes_with_what_pixels_follow_from():
    flips = batches(flip=0.5)
    by_print = {}
    for epoch in range(10):
        by_print.setdefault(flips.fingerprint((epoch, 0)), set()).add(flips.view((epoch, 0)))
    assert [len(views) for views in by_print.values()] == [1, 1]
    assert len({flips.fingerprint((0, number)) for number in range(10)}) == 10
    assert batches().fingerprint((0, 0)) != batches(resolution=32).fingerprint((0, 0))
    assert batches().fingerprint((0, 0)) == batches(seed=1).fingerprint((5, 0))


def test_all_captions_that_training_says():
    prior = items((64, 64), prior=True)
    made = batches(items((64, 64), (64, 64)), prior, trigger="sks", caption_dropout=0.5)
    assert made.captions() == ["", "caption 0", "sks, caption 0", "sks, caption 1"]
    said = {made.caption(key) for epoch in range(20) for batch in made.keys(epoch) for key in batch}
    assert said == set(made.captions())
    assert batches(items((64, 64))).captions() == ["caption 0"]


def test_images_that_the_loss_is_measured_on_do_not_change():
    changing = dict(crop="random", flip=0.5, shuffle_tags=True, tag_dropout=0.5, caption_dropout=0.5, repeats=3)
    made = batches(items((64, 64), (130, 60)), **changing)
    still = Batches(items((64, 64), (130, 60)), unchanging(made.data), batch_size=1, seed=0, resolution=64, multiple=8)
    for number in (0, 1):
        assert len({(made.view((e, number)), made.caption((e, number))) for e in range(20)}) > 2
        assert len({(still.view((e, number)), still.caption((e, number))) for e in range(20)}) == 1
    assert len(still) == 2
