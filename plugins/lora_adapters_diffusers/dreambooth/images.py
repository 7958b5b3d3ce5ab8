"""Images of the subject: a folder, files or PIL images, with their captions and masks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lora_adapters.errors import RequestError

from .captions import caption_files_beside, is_caption_file, read_captions
from .checks import checked
from .draws import Use, draws
from .items import Item

if TYPE_CHECKING:
    from ..recipes import SubjectData

#: Files that operating systems leave in folders.
_OF_SYSTEMS = ("thumbs.db", "desktop.ini")


def read_subject(data: SubjectData, images: Sequence[Image.Image] | None = None) -> list[Item]:
    """Return the images of the subject, each with its caption and mask.

    Args:
        data: the recipe's section.
        images: images that take the place of `data.images`.

    Raises:
        RequestError: there are none, or some can't be read, are too small, are there twice, lack a caption or a mask; or
            there are captions or masks without an image. The message names each with its file.

    Warns:
        LoraAdaptersWarning: images that look alike.
    """
    if images is None:
        return _read(data, data.images, "data.images")
    if not images:
        raise RequestError("images: there are none. Give a list of images, or a folder.")
    for number, image in enumerate(images, 1):
        if not isinstance(image, Image.Image):
            raise RequestError(f"images: image {number} is a {type(image).__name__}, not a PIL image.")
    if data.captions == "files" or data.masks not in (None, "alpha"):
        raise RequestError("images: captions and masks in files go by names, which PIL images lack: give image files.")
    mask = "alpha" if data.masks else None
    items = [Item(f"image {i}", image, data.prompt or "", mask) for i, image in enumerate(images, 1)]
    return checked(items, data.min_side, bool(data.masks and not data.mask_floor), "images", [])


def read_evaluation(data: SubjectData) -> list[Item]:
    """Return the images that `data.eval` names; see `read_subject`."""
    return [] if data.eval is None else _read(data, data.eval, "data.eval")


def hold_out(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Return the images to train on and a share of them held out, chosen by the seed, both in their order.

    Raises:
        RequestError: a part would be empty.
    """
    count = round(len(items) * fraction)
    if not 0 < count < len(items):
        raise RequestError(f"data.eval_fraction: {fraction:g} of {len(items)} images leaves one part empty.")
    held_out = set(draws(Use.HELD_OUT, seed).permutation(len(items))[:count].tolist())
    return (
        [item for i, item in enumerate(items) if i not in held_out],
        [item for i, item in enumerate(items) if i in held_out],
    )


def read_class(folder: Path, prompt: str) -> list[Item]:
    """Return all images of a folder as images of the class, in the order of their names; their captions are not read.

    Raises:
        RequestError: some can't be read, or there are files that are no images.
    """
    problems: list[str] = []
    found, _ = _in_folder(folder, None, problems) if folder.is_dir() else ([], [])
    items = [Item(str(path), path, prompt, prior=True) for path, _ in found]
    return checked(items, 1, False, "prior.folder", problems, distinct=False)


# ---- finding ---------------------------------------------------------------------------------------------------------


def _read(data: SubjectData, named: str | list[str], key: str) -> list[Item]:
    problems: list[str] = []
    images: list[tuple[Path, Path]] = []  # with the path that their masks have in the folder of masks
    captions: dict[Path, str] = {}
    for place in [named] if isinstance(named, str) else named:
        path = Path(place).expanduser()
        if path.is_dir():
            masks = Path(data.masks).expanduser() if data.masks not in (None, "alpha") else None
            found, files = _in_folder(path, masks, problems)
            if not found and not problems:
                problems.append(f"{path}: it is a folder without images")
        else:
            found, files = [(path, Path(path.stem))], caption_files_beside([path])
        images += found
        if data.captions != "none":
            captions |= read_captions([file for file, _ in found], files, problems, whole_folder=path.is_dir())
    if data.captions == "files":
        lacking = [file for file, _ in images if file not in captions]
        problems += [f"{file}: it has no caption (data.captions=files)" for file in lacking]
    masks = _masks(data.masks, images, problems)
    items = [Item(str(file), file, captions.get(file, data.prompt or ""), masks.get(file)) for file, _ in images]
    return checked(items, data.min_side, bool(data.masks and not data.mask_floor), key, problems)


def _in_folder(folder: Path, masks: Path | None, problems: list[str]) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Return the (images, their paths inside without the ending) and the files of captions, sorted."""
    images, captions = [], []
    for path in _files(folder, masks):
        if is_caption_file(path):
            captions.append(path)
        elif path.suffix.lower() in Image.registered_extensions():
            images.append((path, path.relative_to(folder).with_suffix("")))
        else:
            problems.append(f"{path}: it is no image of a kind that Pillow reads; move it away or convert it")
    return images, captions


def _files(folder: Path, without: Path | None = None) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, followlinks=True):
        hidden = [name for name in folders if name.startswith(".") or (without and _same(Path(place, name), without))]
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted(names):
            if not name.startswith(".") and name.lower() not in _OF_SYSTEMS:
                yield Path(place, name)


def _same(one: Path, other: Path) -> bool:
    return other.exists() and os.path.samefile(one, other)


def _masks(named: str | None, images: Sequence[tuple[Path, Path]], problems: list[str]) -> dict[Path, Path]:
    """Return image -> mask ("alpha" for all of them if it is named so)."""
    if named is None or named == "alpha":
        return {file: named for file, _ in images} if named else {}  # type: ignore[misc]
    folder = Path(named).expanduser()
    if not folder.is_dir():
        problems.append(f"{folder}: there is no such folder (data.masks)")
        return {}
    there = {path.relative_to(folder).with_suffix(""): path for path in _files(folder)}
    found = {file: there[name] for file, name in images if name in there}
    problems += [f"{file}: it has no mask in {folder}" for file, _ in images if file not in found]
    problems += [f"{path}: it is a mask without an image" for path in there.values() if path not in found.values()]
    return found
