"""The demo's measures: the judge on real images it has not seen, and each number against one worked out by hand."""

import math

import numpy as np
import pytest
import torch
from lora_adapters_diffusers.demo.digits import SIZE, WORDS, Judge, pictures, read_digits
from lora_adapters_diffusers.demo.measures import share, variety


@pytest.fixture(scope="module")
def digits():
    return read_digits(seed=0)


def test_the_halves_are_apart_and_follow_the_seed(digits):
    train, test = digits
    assert train.pixels.shape == (899, 3, SIZE, SIZE)
    assert len(test.classes) == 898
    assert train.pixels.min() == -1
    assert train.pixels.max() == 1
    seen = {tuple(row) for row in train.pixels.flatten(1).tolist()}
    assert not any(tuple(row) in seen for row in test.pixels.flatten(1).tolist())
    assert torch.equal(read_digits(seed=0)[0].pixels, train.pixels)
    assert not torch.equal(read_digits(seed=1)[0].pixels, train.pixels)


def test_images_of_some_digits(digits):
    some = digits[0].of([3, 7])
    assert set(some.classes.tolist()) == {3, 7}
    assert len(some.classes) == len(some.pixels) == int(torch.isin(digits[0].classes, torch.tensor([3, 7])).sum())


def test_the_judge_names_real_images_it_has_not_seen(digits):
    judge = Judge(*digits)
    assert judge.accuracy > 0.97
    # Chance, where pixels are shuffled: it reads the image.
    order = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(0))
    shuffled = digits[1].pixels.flatten(2)[:, :, order].reshape(digits[1].pixels.shape)
    assert (judge.name(shuffled) == digits[1].classes).float().mean() < 0.3


def test_pictures_keep_pixels(digits):
    (picture,) = pictures(digits[0].pixels[:1])
    assert picture.size == (SIZE, SIZE)
    again = torch.tensor(np.asarray(picture)).permute(2, 0, 1) / 127.5 - 1
    assert (again - digits[0].pixels[0]).abs().max() < 1 / 127


def test_share_and_variety():
    assert share(torch.tensor([9, 9, 9, 1]), 9) == 0.75
    assert variety(torch.tensor([4, 4, 4])) == pytest.approx(1)
    assert variety(torch.arange(len(WORDS)).repeat(3)) == pytest.approx(10)
    assert variety(torch.tensor([0, 0, 0, 5])) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
