"""Captions: which file's an image gets, what is refused, and what training says of an image each time."""

import json

import numpy as np
import pytest
from lora_adapters_diffusers.dreambooth.captions import training_caption, with_trigger
from lora_adapters_diffusers.dreambooth.draws import Use, draws
from lora_adapters_diffusers.dreambooth.images import read_subject
from lora_adapters_diffusers.recipes import SubjectData
from PIL import Image

from lora_adapters.errors import RequestError

PROMPT = "a photo of sks dog"


@pytest.fixture
def folder(tmp_path):
    """A folder with images a.png, b.png and sub/c.png."""
    (tmp_path / "sub").mkdir()
    for seed, name in enumerate(("a", "b", "sub/c")):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def captions(folder, **options):
    items = read_subject(SubjectData(**{"images": str(folder), "prompt": PROMPT, **options}))
    return [item.caption for item in items]


def refusal(folder, **options):
    with pytest.raises(RequestError) as caught:
        captions(folder, **options)
    return str(caught.value)


def test_text_files_beside_the_images(folder):
    (folder / "a.txt").write_text("\ufeffa café,\n  by the sea\n", encoding="utf-8")
    (folder / "sub" / "c.caption").write_text("a dog")
    assert captions(folder) == ["a café, by the sea", PROMPT, "a dog"]
    assert captions(folder, captions="none") == [PROMPT] * 3
    assert "b.png: it has no caption (data.captions=files)" in refusal(folder, captions="files")
    (folder / "b.txt").write_text("b")
    assert captions(folder, captions="files", prompt=None) == ["a café, by the sea", "b", "a dog"]
    assert captions("", images=[str(folder / "sub" / "c.png"), str(folder / "a.png")]) == [
        "a dog",
        "a café, by the sea",
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_as_datasets_reads_it(folder, kind):
    rows = [("a.png", 'a "red, round" ball'), ("sub/c.png", "a dog")]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "text": text, "more": 1}) for name, text in rows]
    else:
        lines = ["file_name,text", 'a.png,"a ""red, round"" ball"', "sub/c.png,a dog"]
    (folder / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    assert captions(folder) == ['a "red, round" ball', PROMPT, "a dog"]
    assert captions("", images=[str(folder / "a.png")]) == ['a "red, round" ball']

    datasets = pytest.importorskip("datasets")
    if kind == "csv":  # it wants a row for every image
        return
    (folder / "b.png").unlink()
    there = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(folder / ".cache"))
    assert sorted(there["text"]) == sorted(captions(folder))


def test_two_captions_must_agree(folder):
    (folder / "a.txt").write_text("a cat")
    (folder / "a.caption").write_text("a  cat ")
    assert captions(folder)[0] == "a cat"
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a dog"}')
    message = refusal(folder)
    assert "a.png: " in message
    assert "metadata.jsonl, line 1" in message
    assert "different captions" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone.txt", b"a cat", "gone.txt: a caption of "),
        ("a.txt", b"", "a.txt: the caption is empty"),
        ("a.txt", b"caf\xe9", "a.txt: it is not in UTF-8"),
        ("metadata.jsonl", b'\n{"file_name": "x.png", "text": "x"}', "metadata.jsonl, line 2: a caption of "),
        ("metadata.jsonl", b'{"file_name": "a.png"', "metadata.jsonl, line 1: it is no JSON"),
        ("metadata.jsonl", b"[1]", "metadata.jsonl, line 1: it is no JSON object"),
        ("metadata.jsonl", b'{"file_name": "a.png", "prompt": "x"}', "are needed, there are: file_name, prompt"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": 3}', "line 1: texts file_name and text are needed"),
        ("metadata.csv", b"file_name,text\na.png\n", "metadata.csv, line 2: texts file_name and text are needed"),
        ("metadata.csv", b'file_name,text\na.png,"open\n', "metadata.csv: unexpected end of data"),
    ],
)
def test_files_that_are_wrong_are_named(folder, name, content, expected):
    (folder / name).write_bytes(content)
    assert expected in refusal(folder)


# ---- in training -----------------------------------------------------------------------------------------------------

TAGS = "sks dog, red, round, small, outside, at night"


def said(count=200, caption=TAGS, **options):
    data = SubjectData(images="unused", prompt="unused", **options)
    return [training_caption(caption, data, draws(Use.CAPTION, 0, epoch, 3)) for epoch in range(count)]


def test_without_options_the_caption_is_as_it_was_written():
    assert set(said(caption="a dog,red ,  and round")) == {"a dog,red ,  and round"}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", "sks, a dog"),
        ("a photo of sks dog", "a photo of sks dog"),
        ("SKS, dog", "SKS, dog"),
        ("a sksy dog", "sks, a sksy dog"),
        ("", "sks"),
    ],
)
def test_the_trigger_is_put_where_it_lacks(caption, expected):
    assert with_trigger(caption, "sks") == expected
    assert with_trigger(caption, None) == caption
    assert set(said(caption=caption, trigger="sks")) == {expected}


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_tags_are_shuffled_behind_those_that_are_kept(keep):
    found = said(shuffle_tags=True, keep_tags=keep)
    tags = TAGS.split(", ")
    assert len(set(found)) > 5
    for caption in found:
        assert caption.split(", ")[:keep] == tags[:keep]
        assert sorted(caption.split(", ")) == sorted(tags)
    assert {caption.split(", ")[keep] for caption in found} == set(tags[keep:])


def test_tags_are_dropped_at_their_rate_in_their_order():
    tags = TAGS.split(", ")
    found = [caption.split(", ") for caption in said(1000, tag_dropout=0.3)]
    assert all(caption == [tag for tag in tags if tag in caption] for caption in found)
    assert all(caption[0] == tags[0] for caption in found)
    for tag in tags[1:]:
        assert sum(tag not in caption for caption in found) / 1000 == pytest.approx(0.3, abs=0.05)


def test_captions_are_dropped_at_their_rate_and_nothing_else_changes():
    plain, dropped = said(1000, shuffle_tags=True), said(1000, shuffle_tags=True, caption_dropout=0.1)
    assert sum(not caption for caption in dropped) / 1000 == pytest.approx(0.1, abs=0.03)
    assert all(one in ("", other) for one, other in zip(dropped, plain, strict=True))
    assert said(50, shuffle_tags=True, trigger="sks", caption_dropout=0.5).count("") > 10


def test_what_is_said_follows_from_the_seed_the_epoch_and_the_number():
    data = SubjectData(images="unused", prompt="unused", shuffle_tags=True)

    def one(*numbers):
        return training_caption(TAGS, data, draws(Use.CAPTION, *numbers))

    np.random.seed(0)
    first = one(0, 1, 2)
    np.random.seed(1)
    assert one(0, 1, 2) == first
    for numbers in ([(seed, 1, 2) for seed in range(9)], [(0, e, 2) for e in range(9)], [(0, 1, n) for n in range(9)]):
        assert len({one(*three) for three in numbers}) > 3
