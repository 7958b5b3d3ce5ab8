"""Batches: what is random about an image follows from the seed, the epoch and its number; mixing keeps targets whole."""

import random

import numpy as np
import pytest
import torch
from lora_adapters_timm.augmentation import Mixing, Prepared, drawn_from, evaluation_transform, training_transform
from lora_adapters_timm.data import read_images
from lora_adapters_timm.recipes import Augmentation, ImageData
from pictures import write_digits
from PIL import Image

from lora_adapters.errors import RequestError

CONFIG = {
    "input_size": (3, 24, 24),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "crop_pct": 0.9,
    "crop_mode": "center",
}
EVERYTHING = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5, erasing_mode="pixel", vflip=0.3)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return read_images(
        ImageData(train=write_digits(tmp_path_factory.mktemp("data") / "d", 24, classes=3, side=32)), "train"
    )


def prepared(images, augmentation=EVERYTHING, seed=0, channels=3):
    return Prepared(images, images.classes, training_transform(CONFIG, augmentation), channels, seed)


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_generators_are_where_they_were():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = drawn()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    with drawn_from(3, 1, 4):
        inside = drawn()
    assert drawn() == before
    with drawn_from(3, 1, 4):
        assert drawn() == inside
    with drawn_from(3, 1, 5):
        assert not set(drawn()) & set(inside)


def test_an_image_is_the_same_however_often_and_in_whatever_order_it_is_read(images):
    one, other = prepared(images), prepared(images)
    first = [one[0, i][0] for i in range(6)]
    for i in reversed(range(6)):
        torch.rand(5)
        assert torch.equal(other[0, i][0], first[i])
    for key, seed in (((1, 0), 0), ((0, 0), 1)):
        assert not torch.equal(prepared(images, seed=seed)[key][0], first[0])


def test_worker_processes_change_nothing(images):
    keys = [[(epoch, i) for i in range(start, start + 4)] for epoch in range(2) for start in range(0, 12, 4)]
    state = torch.get_rng_state()
    here = list(prepared(images).batches(keys, 0))
    there = list(prepared(images).batches(keys, 2))
    assert torch.equal(torch.get_rng_state(), state), "reading must take nothing from the generator of dropout"
    assert len(here) == len(there) == 6
    for (pixels, labels), (other, same) in zip(here, there, strict=True):
        assert pixels.shape == (4, 3, 24, 24)
        assert torch.equal(pixels, other)
        assert torch.equal(labels, same)


def test_labels_are_indices_in_the_given_order(images):
    transform = evaluation_transform({**CONFIG, "input_size": (1, 24, 24), "mean": (0.5,), "std": (0.25,)})
    swapped = Prepared(images, ["digit2", "digit0", "digit1"], transform, 1, None)
    pixels, label = swapped[0, 0]
    assert pixels.shape == (1, 24, 24)
    assert (images.labels[0], label) == ("digit0", 1)


def test_without_augmentation_images_are_prepared_as_for_evaluation(images):
    plain = prepared(images, Augmentation(enabled=False))
    expected = evaluation_transform(CONFIG)(images.read(images.items[5]).convert("RGB"))
    assert torch.equal(plain[0, 5][0], expected)
    assert torch.equal(plain[7, 5][0], expected)


@pytest.mark.parametrize("policy", ["nonsense", "rnd-m9", "rand-mx"])
def test_unknown_policies_are_refused(policy):
    with pytest.raises(RequestError, match=r"augmentation\.auto_augment: timm has no policy"):
        training_transform(CONFIG, Augmentation(auto_augment=policy))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_mixing(mode, rows):
    mixing = Mixing(Augmentation(mixup=0.5, cutmix=0.5, mix_mode=mode), 0.1, 4, seed=3)
    images, labels = torch.randn(rows, 3, 8, 8), torch.arange(rows) % 4
    mixed, targets = mixing(images.clone(), labels, 7, 1)
    again, same = mixing(images.clone(), labels, 7, 1)
    assert torch.equal(mixed, again)
    assert torch.equal(targets, same)
    assert mixed.shape == images.shape
    torch.testing.assert_close(targets.sum(1), torch.ones(rows))
    if rows % 2:  # the last one has no partner
        assert torch.equal(mixed[-1], images[-1])
        torch.testing.assert_close(targets[-1], 0.9 * torch.eye(4)[labels[-1]] + 0.025)
    if rows > 1:
        assert not torch.equal(mixed, images)
        assert not torch.equal(mixing(images.clone(), labels, 8, 1)[0], mixed)


def test_smoothed_targets_are_torchs_label_smoothing():
    """The loss of the targets, on odd sizes, and its gradient, against torch's own."""
    labels, logits = torch.tensor([0, 2, 2, 4, 1]), torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    _, targets = Mixing(Augmentation(), 0.2, 5, seed=0)(torch.zeros(5, 3, 2, 2), labels, 0, 0)
    ours = torch.nn.functional.cross_entropy(logits, targets.double())
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "original", "augmix-m10"])
def test_posterizing_leaves_a_bit(policy):
    transform = training_transform(CONFIG, Augmentation(auto_augment=policy))
    groups = [group for t in transform.transforms for group in [getattr(t, "ops", ()), *getattr(t, "policy", ())]]
    posterizing = [op for group in groups for op in group if op.name.startswith("Posterize")]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert posterizing
    for op in posterizing:
        op.prob, op.magnitude, op.magnitude_std = 1, 10 * (op.name != "PosterizeOriginal"), 0
        op(image)
        op.magnitude = 0
        op(image)
