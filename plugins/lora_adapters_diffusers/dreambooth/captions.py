"""Captions: from files beside the images, and what training says of an image.

Files are of kohya's conventions (name.txt, name.caption) and of datasets' ImageFolder (metadata.jsonl or metadata.csv with
the columns file_name and text, in the folder of the images or above them).
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from os.path import normpath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..recipes import SubjectData

#: Endings of files with one caption, and names of files with many.
SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
_COLUMNS = ("file_name", "text")


def is_caption_file(path: Path) -> bool:
    """Return True for a file that holds captions."""
    return path.suffix.lower() in SUFFIXES or path.name in METADATA


def caption_files_beside(images: Iterable[Path]) -> list[Path]:
    """Return the files that may hold captions of images which were named one by one."""
    beside = {image.with_suffix(suffix) for image in images for suffix in SUFFIXES}
    beside |= {image.parent / name for image in images for name in METADATA}
    return sorted(path for path in beside if path.is_file())


def read_captions(
    images: Sequence[Path], files: Iterable[Path], problems: list[str], whole_folder: bool
) -> dict[Path, str]:
    """Return the captions of images that have one, on one line each.

    Args:
        images: the images.
        files: files that hold captions.
        problems: what is wrong is added here: files that can't be read, no text, two captions that differ.
        whole_folder: a caption of an image that is not among `images` is wrong too.
    """
    named = defaultdict(list)
    for image in images:
        named[normpath(image)].append(image)
        named[normpath(image.with_suffix(""))].append(image)
    captions: dict[Path, str] = {}
    places: dict[Path, str] = {}
    for file in files:
        try:
            for place, target, text in _captions_in(file):
                if not named[target] and whole_folder:
                    problems.append(f"{place}: a caption of {target}, which is not there")
                for image in named[target]:
                    if captions.setdefault(image, text) != text:
                        problems.append(f"{image}: {places[image]} and {place} give it different captions")
                    places.setdefault(image, place)
        except (OSError, ValueError, csv.Error) as error:
            problems.append(str(error) if str(error).startswith(str(file)) else f"{file}: {error}")
    return captions


def _captions_in(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (place, path of the image with or without its ending, caption)."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: it is not in UTF-8") from error
    if file.name not in METADATA:
        yield str(file), normpath(file.with_suffix("")), _one_line(text, str(file))
        return
    for place, row in _rows(file, text):
        name, caption = (row.get(column) for column in _COLUMNS)
        if not isinstance(name, str) or not isinstance(caption, str):
            raise ValueError(f"{place}: texts file_name and text are needed, there are: {', '.join(map(str, row))}")
        yield place, normpath(file.parent / name), _one_line(caption, place)


def _rows(file: Path, text: str) -> Iterator[tuple[str, dict]]:
    if file.suffix == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
        for row in reader:
            yield f"{file}, line {reader.line_num}", row
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: it is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: it is no JSON object")
            yield f"{file}, line {number}", row


def _one_line(text: str, place: str) -> str:
    words = " ".join(text.split())
    if not words:
        raise ValueError(f"{place}: the caption is empty (data.caption_dropout trains with empty ones)")
    return words


# ---- in training -----------------------------------------------------------------------------------------------------


def with_trigger(caption: str, trigger: str | None) -> str:
    """Return the caption with the trigger word before it, unless it holds it: "sks, a photo of a dog"."""
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def training_caption(caption: str, data: SubjectData, random: np.random.Generator) -> str:
    """Return what is said of an image this time.

    An empty caption at the rate `data.caption_dropout` is what classifier-free guidance needs (arXiv:2207.12598, alg. 1).

    Args:
        caption: as it was read, or the prompt.
        data: trigger, shuffle_tags, keep_tags, tag_dropout, caption_dropout.
        random: draws of this image and epoch.
    """
    empty = random.random() < data.caption_dropout
    caption = with_trigger(caption, data.trigger)
    if data.shuffle_tags or data.tag_dropout:
        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        first, others = tags[: data.keep_tags], tags[data.keep_tags :]
        kept = random.random(len(others)) >= data.tag_dropout
        order = random.permutation(len(others)) if data.shuffle_tags else range(len(others))
        caption = ", ".join([*first, *(others[i] for i in order if kept[i])])
    return "" if empty else caption
