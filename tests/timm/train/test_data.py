"""Folders of images: what is found, what is refused and how it is said, who is held out."""

import numpy as np
import pytest
import torch
from lora_adapters_timm.data import check_count, check_labels, divide, image_mode, limited, read_images
from lora_adapters_timm.recipes import ImageData
from pictures import write_digits
from PIL import Image

from lora_adapters.errors import RequestError, UnsupportedError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits", 60, classes=4)


def test_a_folder_gives_its_classes_in_timms_order(folder, tmp_path):
    images = read_images(ImageData(train=folder), "train")
    assert images.classes == ["digit0", "digit1", "digit2", "digit3"]
    assert len(images) == 60
    assert images.source == folder
    picture = images.read(images.items[7])
    assert picture.size == (16, 16)
    assert images.items[7].startswith(images.labels[7])
    for name in ("a10", "a9"):  # as numbers, not as texts
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.jpg")
    assert read_images(ImageData(train=str(tmp_path)), "train").classes == ["a9", "a10"]


def test_the_facts_count_classes(folder):
    facts = read_images(ImageData(train=folder), "train").facts("train")
    assert facts.rows == 60
    assert facts.details["classes"] == 4
    assert facts.details["labels"].startswith("digit0 ")


def broken(folder):
    """A folder with whole images, and three that are not."""
    write_digits(folder, 20, classes=2)
    whole = (folder / "digit0" / "0000.png").read_bytes()
    (folder / "digit0" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "digit1" / "empty.png").touch()
    (folder / "digit1" / "text.jpg").write_text("no picture")
    return str(folder)


def test_broken_files_are_named(tmp_path):
    with pytest.raises(RequestError) as caught:
        read_images(ImageData(train=broken(tmp_path)), "train")
    message = str(caught.value)
    assert "data.train: 3 files are no images" in message
    for part in ("cut.png", "empty.png (it is empty)", "text.jpg (it is of no known format)", "Mend or remove them"):
        assert part in message


def test_open_finds_what_a_header_tells(tmp_path):
    """And the cut one is named when it is read: never passed over."""
    folder = broken(tmp_path)
    with pytest.raises(RequestError, match="2 files are no images"):
        read_images(ImageData(train=folder, check="open"), "train")
    (tmp_path / "digit1" / "empty.png").unlink()
    (tmp_path / "digit1" / "text.jpg").unlink()
    images = read_images(ImageData(train=folder, check="open"), "train")
    with pytest.raises(RequestError, match=r"cut\.png is no image that can be read"):
        images.read(next(item for item in images.items if "cut" in item))


def test_folders_without_classes_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"data\.train: there is no folder"):
        read_images(ImageData(train=str(tmp_path / "missing")), "train")
    with pytest.raises(RequestError, match="holds no image"):
        read_images(ImageData(train=str(tmp_path)), "train")
    Image.new("RGB", (4, 4)).save(tmp_path / "stray.png")
    with pytest.raises(RequestError, match=r"stray\.png lies in no class's subfolder"):
        read_images(ImageData(train=str(tmp_path)), "train")
    with pytest.raises(RequestError, match="a folder, which has no splits"):
        read_images(ImageData(train=str(tmp_path), eval_split="test"), "eval")


def test_a_class_that_is_not_trained_is_told_with_the_nearest(folder):
    images = read_images(ImageData(train=folder), "train")
    check_labels(images, images.classes, "eval")
    with pytest.raises(RequestError, match=r"data\.eval: class 'digit3' in .*digit3/.* did you mean 'digit2'"):
        check_labels(images, ["digit0", "digit1", "digit2"], "eval")


@pytest.mark.parametrize(("labels", "message"), [(["a", "b", "a"], "'a' is named twice"), (["a"], "one class only")])
def test_classes_are_counted(labels, message):
    with pytest.raises(RequestError, match=message):
        check_count(labels)
    check_count(["a", "b"])


def test_the_seed_says_who_is_held_out(folder):
    images = read_images(ImageData(train=folder), "train")
    train, held_out = divide(images, 0.25, seed=3)
    assert (len(train), len(held_out)) == (45, 15)
    assert not set(train.items) & set(held_out.items)
    assert sorted(train.items + held_out.items) == sorted(images.items)
    assert divide(images, 0.25, seed=3)[1].items == held_out.items
    assert divide(images, 0.25, seed=4)[1].items != held_out.items
    with pytest.raises(RequestError, match="leaves one part empty"):
        divide(images, 0.001, seed=0)
    some = limited(images, 12, seed=0)
    assert len(some) == 12
    assert len(set(some.labels)) > 1
    assert limited(images, None, seed=0) is images


def test_modes():
    assert [image_mode(n) for n in (1, 3, 4)] == ["L", "RGB", "RGBA"]
    with pytest.raises(UnsupportedError, match="12 channels"):
        image_mode(12)


# ---- datasets that timm names ----------------------------------------------------------------------------------------


def test_a_dataset_of_torchvision(tmp_path):
    """MNIST's own files, written here: ten images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in pixels.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x0a" + bytes(range(10)))
    images = read_images(ImageData(train="torch/mnist", root=str(tmp_path), eval_split="validation"), "eval")
    assert images.source == "torch/mnist (validation)"
    assert images.labels == images.classes
    assert images.classes[3] == "3 - three"
    assert np.array_equal(np.asarray(images.read(images.items[3])), pixels[3])
    with pytest.raises(RequestError, match=r"data\.train: timm can't make the dataset 'torch/cifar10'"):
        read_images(ImageData(train="torch/cifar10", root=str(tmp_path)), "train")


def test_a_dataset_of_hugging_face(folder):
    """datasets reads a folder of images as it is."""
    pytest.importorskip("datasets")
    images = read_images(ImageData(train=f"hfds/{folder}"), "train")
    assert images.classes == ["digit0", "digit1", "digit2", "digit3"]
    assert sorted(images.labels) == sorted(read_images(ImageData(train=folder), "train").labels)
    assert images.read(images.items[0]).size == (16, 16)
    assert torch.tensor(np.asarray(images.read(images.items[0]))).any()
