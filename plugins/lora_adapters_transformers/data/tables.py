"""The rows of a recipe's `data`: from files, folders and the Hub to `datasets.Dataset`."""

from __future__ import annotations

import random
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from lora_adapters.error_text import first_line
from lora_adapters.errors import RequestError
from lora_adapters_transformers.data.readers import KINDS, kind_of, read_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    import datasets

    from lora_adapters_transformers.recipes import TextData


def read_data(data: TextData, seed: int) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return the training and the evaluation rows of a recipe, in the order of the file.

    `limit` and `eval_limit` take rows at random by `seed`: files are often sorted by label. With `eval_fraction` the
    rows are limited first, then divided at random.

    Raises:
        RequestError: a source is missing, broken or empty, or too small to be divided.
    """
    train = read_table(data.train, subset=data.subset, split=data.split, key="data.train")
    train = _some(train, data.limit, seed)
    if data.eval_fraction:
        train, held_out = _divide(train, data.eval_fraction, seed)
    elif data.eval is not None:
        held_out = read_table(data.eval, subset=data.subset, split=data.split, key="data.eval")
    elif data.eval_split is not None:
        held_out = read_table(data.train, subset=data.subset, split=data.eval_split, key="data.eval_split")
    else:
        return train, None
    return train, _some(held_out, data.eval_limit, seed)


def read_table(
    source: str | list[str],
    *,
    subset: str | None = None,
    split: str = "train",
    key: str = "data",
) -> datasets.Dataset:
    """Return the rows of one source: a file, a folder of files of one kind, a list of these, or a dataset on the Hub.

    Files are read as they are now: nothing is cached. `subset` and `split` are for Hub datasets and for folders that
    `save_to_disk` wrote. `key` is the recipe's name for the source, for messages.

    Raises:
        RequestError: the source is missing (with the nearest name), broken (with the line) or empty.
    """
    names = [source] if isinstance(source, str) else source
    if not names:
        raise RequestError(f"{key}: the list is empty: name at least one file")
    rows = _join([_one(name, subset, split, key) for name in names])
    if not len(rows):
        raise RequestError(f"{key}: {', '.join(names)} has no rows")
    return rows


def _one(name: str, subset: str | None, split: str, key: str) -> datasets.Dataset:
    path = Path(name).expanduser()
    if not path.exists():
        if _looks_like_a_path(name):
            raise RequestError(f"{key}: no file or folder {name!r}{_nearest(path)}")
        return _hub(name, subset, split, key)
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return _saved(path, split, key)
    if subset is not None or split != "train":
        given = "subset" if subset is not None else "split" if key != "data.eval_split" else "eval_split"
        raise RequestError(
            f"{key}: {name} is a {'folder' if path.is_dir() else 'file'}, which has no {given}: leave it out"
        )
    if path.is_dir():
        return _folder(path, key)
    if kind_of(path) is None:
        raise RequestError(f"{key}: {name} is of no kind that can be read: {', '.join(KINDS)}, each also with .gz")
    return read_file(path)


def _looks_like_a_path(name: str) -> bool:
    path = Path(name)
    return kind_of(path) is not None or name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name


def _nearest(path: Path) -> str:
    folder = path.parent
    while not folder.exists():
        path, folder = folder, folder.parent
    near = get_close_matches(path.name, sorted(p.name for p in folder.iterdir()), n=1, cutoff=0.5)
    if near:
        return f"; did you mean {str(folder / near[0])!r}?"
    return f"; paths are relative to {'the working directory' if not path.is_absolute() else 'the root'}"


def _folder(folder: Path, key: str) -> datasets.Dataset:
    hidden = [p for p in folder.rglob("*") if p.is_file() and kind_of(p)]
    files = sorted(p for p in hidden if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not files:
        raise RequestError(f"{key}: folder {folder} has no file of a kind that can be read: {', '.join(KINDS)}")
    kinds = {kind_of(p): p for p in reversed(files)}
    if len(kinds) > 1:
        some = " and ".join(str(p.relative_to(folder)) for p in sorted(kinds.values())[:2])
        raise RequestError(f"{key}: folder {folder} has files of several kinds ({some}): name the files to take")
    return _join([read_file(p) for p in files])


def _saved(folder: Path, split: str, key: str) -> datasets.Dataset:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as e:
        raise RequestError(f"{key}: {folder} can't be read as a saved dataset: {first_line(e)}") from e
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise RequestError(f"{key}: {folder} has no split {split!r}; it has {', '.join(rows)}")
        return rows[split]
    if split != "train":
        raise RequestError(f"{key}: {folder} is one dataset without splits: leave out the split")
    return rows


def _hub(name: str, subset: str | None, split: str, key: str) -> datasets.Dataset:
    import datasets

    try:
        with _quiet():
            rows = datasets.load_dataset(name, subset, split=split)
    except Exception as e:  # the library has dozens of reasons, from a misspelt name to a full disk
        near = get_close_matches(name, sorted(p.name for p in Path().iterdir()), n=1, cutoff=0.6)
        hint = f"; did you mean the file {near[0]!r}?" if near else ""
        raise RequestError(
            f"{key}: {name!r} is no file or folder here, and no Hub dataset that can be loaded ({first_line(e)}){hint}"
        ) from e
    if not isinstance(rows, datasets.Dataset):
        raise RequestError(f"{key}: {name!r} with split {split!r} is no single table: name one split")
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep datasets' progress bars off the terminal, and put them back as they were."""
    import datasets

    shown = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


def _join(parts: list[datasets.Dataset]) -> datasets.Dataset:
    """Put tables under each other. Columns that one has as text and one as numbers become text in both."""
    import datasets

    from lora_adapters_transformers.data.columns import table

    if len(parts) == 1:
        return parts[0]
    if all(part.features == parts[0].features for part in parts):
        return datasets.concatenate_datasets(parts)
    return table(row for part in parts for row in part)


def _some(rows: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), limit)))


def _divide(rows: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    count = max(1, round(fraction * len(rows)))
    if count >= len(rows):
        raise RequestError(
            f"data.eval_fraction: {fraction:g} of {len(rows)} {'row' if len(rows) == 1 else 'rows'} leaves none to train "
            "on: give more rows or a smaller fraction"
        )
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    kept = [i for i in range(len(rows)) if i not in held_out]
    return rows.select(kept), rows.select(sorted(held_out))
