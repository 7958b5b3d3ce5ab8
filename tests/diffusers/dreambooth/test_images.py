"""Images of the subject: what is found, what is refused and how it is said, and that any kind of file comes out right."""

import numpy as np
import pytest
from lora_adapters_diffusers.dreambooth.images import hold_out, read_class, read_evaluation, read_subject
from lora_adapters_diffusers.recipes import SubjectData
from PIL import Image
from sklearn.datasets import load_sample_images

from lora_adapters.errors import LoraAdaptersWarning, RequestError

PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def photos():
    """Two real photos, 213 x 320 pixels."""
    return [Image.fromarray(pixels).resize((320, 213)) for pixels in load_sample_images().images]


def data(images, **options):
    named = images if isinstance(images, list) else str(images)
    return SubjectData(**{"images": named, "prompt": PROMPT, **options})


def noise(seed, size=(80, 64), mode="RGB"):
    channels = len(mode) if mode != "L" else 1
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def refusal(data, images=None):
    with pytest.raises(RequestError) as caught:
        read_subject(data, images)
    return str(caught.value)


# ---- where they come from --------------------------------------------------------------------------------------------


def test_a_folder_with_subfolders(photos, tmp_path):
    (tmp_path / "more").mkdir()
    photos[0].save(tmp_path / "b.png")
    photos[1].save(tmp_path / "more" / "a.JPG")
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    items = read_subject(data(tmp_path))
    assert [item.name for item in items] == [str(tmp_path / "b.png"), str(tmp_path / "more" / "a.JPG")]
    assert [(item.caption, item.size, item.prior) for item in items] == [(PROMPT, (320, 213), False)] * 2
    assert len({item.digest for item in items}) == 2
    image, mask = items[0].open()
    assert mask is None
    assert np.array_equal(np.asarray(image), np.asarray(photos[0]))


def test_files_and_folders_by_name(photos, tmp_path):
    (tmp_path / "folder").mkdir()
    photos[0].save(tmp_path / "one.png")
    (tmp_path / "not asked for.docx").touch()
    photos[1].save(tmp_path / "folder" / "two.png")
    assert len(read_subject(data(tmp_path / "one.png"))) == 1
    both = read_subject(data([str(tmp_path / "one.png"), str(tmp_path / "folder")]))
    assert [item.source.name for item in both] == ["one.png", "two.png"]
    assert "gone.png: there is no such file" in refusal(data(tmp_path / "gone.png"))


def test_pil_images(photos):
    items = read_subject(data("unused"), photos)
    assert [(item.name, item.caption) for item in items] == [("image 1", PROMPT), ("image 2", PROMPT)]
    assert np.array_equal(np.asarray(items[1].open()[0]), np.asarray(photos[1]))
    assert "there are none" in refusal(data("unused"), [])
    assert "image 2 is a str" in refusal(data("unused"), [photos[0], "x.png"])
    assert "image 2: it has 20 x 80 pixels" in refusal(data("unused"), [photos[0], noise(0, (20, 80))])
    assert "go by names" in refusal(data("unused", captions="files"), photos)
    assert "go by names" in refusal(data("unused", masks="masks"), photos)


def test_evaluation_and_the_held_out(photos, tmp_path):
    photos[0].save(tmp_path / "a.png")
    assert read_evaluation(data("unused")) == []
    assert [item.size for item in read_evaluation(data("unused", eval=str(tmp_path)))] == [(320, 213)]
    with pytest.raises(RequestError, match=r"data\.eval: .*\n.*gone"):
        read_evaluation(data("unused", eval=str(tmp_path / "gone")))
    items = read_subject(data("unused"), [noise(seed) for seed in range(8)])
    train, held_out = hold_out(items, 0.25, seed=3)
    assert (len(train), len(held_out)) == (6, 2)
    assert {item.name for item in (*train, *held_out)} == {item.name for item in items}
    assert [item.name for item in hold_out(items, 0.25, seed=3)[1]] == [item.name for item in held_out]
    assert len({hold_out(items, 0.25, seed)[1][0].name for seed in range(8)}) > 1
    with pytest.raises(RequestError, match="leaves one part empty"):
        hold_out(items, 0.01, seed=0)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_said_at_once(photos, tmp_path):
    photos[0].save(tmp_path / "one.png")
    whole = (tmp_path / "one.png").read_bytes()
    (tmp_path / "again.png").write_bytes(whole)
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "notes.docx").write_text("no picture either")
    (tmp_path / "gone.txt").write_text("a caption")
    (tmp_path / "blank.caption").write_text(" \n")
    noise(1, (63, 200)).save(tmp_path / "narrow.png")
    noise(0).save(tmp_path / "moving.gif", save_all=True, append_images=[noise(2)])
    message = refusal(data(tmp_path))
    for part in (
        "data.images: mend or remove these first:",
        "again.png and ",
        "one.png: the same image",
        "cut.png: ",
        "empty.jpg: it is empty",
        "text.jpg: it is of no known format",
        "notes.docx: it is no image",
        "gone.txt: a caption of ",
        "blank.caption: the caption is empty",
        "narrow.png: it has 63 x 200 pixels, less than data.min_side=64",
        "moving.gif: it holds 2 images",
    ):
        assert part in message
    assert len(message.splitlines()) == 10


def test_many_problems_are_counted(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.png").touch()
    message = refusal(data(tmp_path))
    assert len(message.splitlines()) == 22
    assert message.endswith("... and 10 more")


def test_empty_folders(tmp_path):
    assert "it is a folder without images" in refusal(data(tmp_path))
    (tmp_path / "sub").mkdir()
    assert "it is a folder without images" in refusal(data(tmp_path))


def test_a_file_that_changes_after_the_check_is_named(photos, tmp_path):
    photos[0].save(tmp_path / "one.png")
    (item,) = read_subject(data(tmp_path))
    (tmp_path / "one.png").unlink()
    with pytest.raises(RequestError, match=r"one\.png: there is no such file"):
        item.open()


def test_images_that_look_alike_are_a_warning(photos, tmp_path):
    photos[0].save(tmp_path / "one.png")
    photos[0].resize((240, 160)).save(tmp_path / "smaller.jpg", quality=70)
    photos[1].save(tmp_path / "other.png")
    with pytest.warns(LoraAdaptersWarning, match=r"look alike.*: \S*one\.png and \S*smaller\.jpg\."):
        assert len(read_subject(data(tmp_path))) == 3


@pytest.mark.filterwarnings("error")
def test_other_parts_and_other_colours_are_no_duplicates(photos):
    parts = [photos[0].crop((0, 0, 200, 200)), photos[0].crop((60, 10, 260, 210)), photos[0].transpose(0)]
    plain = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    assert len(read_subject(data("unused"), [*parts, *plain])) == 5


# ---- kinds of images -------------------------------------------------------------------------------------------------


def saved(image, tmp_path, name="image.png", **options):
    image.save(tmp_path / name, **options)
    (item,) = read_subject(data(tmp_path))
    return item


def test_a_photo_is_turned_as_the_camera_was_held(photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown rotated by 90 degrees clockwise
    item = saved(photos[0], tmp_path, exif=exif)
    assert item.size == (213, 320)
    assert np.array_equal(np.asarray(item.open()[0]), np.asarray(photos[0].transpose(Image.Transpose.ROTATE_270)))


def test_sixteen_bits_become_eight_without_clipping(tmp_path):
    values = np.arange(80 * 64, dtype=np.uint16).reshape(64, 80) * 12
    pixels = np.asarray(saved(Image.fromarray(values), tmp_path).open()[0])
    assert np.array_equal(pixels, np.rint(values / 257).astype(np.uint8)[..., None].repeat(3, 2))


def test_floating_images_are_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).random((64, 64), dtype=np.float32)).save(tmp_path / "float.tiff")
    assert "float.tiff: its values are neither of 8 nor of 16 bits" in refusal(data(tmp_path))


@pytest.mark.parametrize(("mode", "name"), [("P", "x.png"), ("CMYK", "x.jpg"), ("L", "x.png"), ("1", "x.png")])
def test_palettes_cmyk_and_grey(photos, tmp_path, mode, name):
    image = photos[1].convert(mode)
    shown, _ = saved(image, tmp_path, name).open()
    assert shown.mode == "RGB"
    difference = np.abs(np.asarray(shown, dtype=int) - np.asarray(image.convert("RGB"), dtype=int))
    assert difference.mean() < (8 if mode == "CMYK" else 1e-9)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path, mode):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 32, 64))
    image.paste((0, 0, 0, 51), (0, 0, 64, 8)) if mode != "P" else None
    pixels = np.asarray(saved(image.convert(mode), tmp_path).open()[0])
    assert pixels[40, 10].tolist() == [0, 0, 0]
    assert pixels[40, 50].tolist() == [255, 255, 255]
    if mode != "P":
        assert pixels[4, 50].tolist() == [204, 204, 204]


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_masks(photos, tmp_path):
    (tmp_path / "images" / "masks").mkdir(parents=True)  # inside is fine: they are not taken for images
    for name, photo in zip("ab", photos, strict=True):
        photo.save(tmp_path / "images" / f"{name}.jpg")
        mask = Image.new("L", photo.size)
        mask.paste(255, (0, 0, 50, 50))
        mask.save(tmp_path / "images" / "masks" / f"{name}.png")
    masked = data(tmp_path / "images", masks=str(tmp_path / "images" / "masks"))
    items = read_subject(masked)
    assert len(items) == 2
    _, mask = items[0].open()
    assert (mask.mode, mask.getbbox()) == ("L", (0, 0, 50, 50))

    masks = tmp_path / "images" / "masks"
    Image.new("L", (10, 10)).save(masks / "a.png")
    assert "its mask " in refusal(masked)
    assert "a.png has 10 x 10 pixels, and the image 320 x 213" in refusal(masked)
    Image.new("L", photos[0].size).save(masks / "a.png")
    assert "a.jpg: its mask is black" in refusal(masked)
    assert len(read_subject(masked.model_copy(update={"mask_floor": 0.1}))) == 2
    (masks / "a.png").rename(masks / "c.png")
    message = refusal(masked)
    assert "a.jpg: it has no mask" in message
    assert "c.png: it is a mask without an image" in message
    (masks / "c.png").unlink()
    (masks / "a.png").touch()
    assert "a.png can't be read: it is empty" in refusal(masked)


def test_the_alpha_channel_as_mask(photos, tmp_path):
    alpha = Image.new("L", photos[0].size, 0)
    alpha.paste(255, (10, 20, 60, 80))
    photo = photos[0].copy()
    photo.putalpha(alpha)
    photo.save(tmp_path / "a.png")
    (item,) = read_subject(data(tmp_path, masks="alpha"))
    image, mask = item.open()
    assert mask.getbbox() == (10, 20, 60, 80)
    assert np.array_equal(np.asarray(image), np.asarray(photos[0]))  # not flattened
    (flat,) = read_subject(data(tmp_path))
    assert flat.digest != item.digest
    photos[0].save(tmp_path / "a.png")
    assert "a.png: it has no transparency" in refusal(data(tmp_path, masks="alpha"))


def test_images_of_the_class_have_its_prompt_and_may_be_small_or_twice(tmp_path):
    assert read_class(tmp_path / "gone", "a dog") == []
    for name in "ab":
        noise(0, (32, 32)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("not read")
    items = read_class(tmp_path, "a dog")
    assert [(item.caption, item.prior, item.size) for item in items] == [("a dog", True, (32, 32))] * 2
    (tmp_path / "c.png").touch()
    with pytest.raises(RequestError, match=r"prior\.folder: .*\n.*c\.png: it is empty"):
        read_class(tmp_path, "a dog")
