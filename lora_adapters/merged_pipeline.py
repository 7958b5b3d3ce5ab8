"""Merging an adapter of a diffusion model into a checkpoint in one file, or into a folder of diffusers, as one act."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .api import progress_bar
from .errors import CheckpointError, RequestError, UnsupportedError
from .merge_place import check_apart, check_space, checked_file, checked_folder
from .staging import new_folder, write_file

if TYPE_CHECKING:
    import torch

    from .formats.merging import MergePlan

_DTYPES = ("float32", "bfloat16", "float16")
#: Checkpoints of one file that can't be read as safetensors.
_OTHER_FILES = {".ckpt": "a pickle, which can run code when read", ".gguf": "quantized"}


def is_diffusion(base: str | Path) -> bool:
    """Return True if a base is what `merge_pipeline` merges into: a single file of a known family, or diffusers' folder.

    Raises:
        UnsupportedError: it is a checkpoint in one file, in a form that is not merged into.
        CheckpointError: it is a safetensors file, and damaged.
    """
    from .formats.merging import released_checkpoint
    from .formats.merging_folder import is_diffusers_folder

    path = Path(base).expanduser()
    if path.suffix in _OTHER_FILES and path.is_file():
        raise UnsupportedError(
            f"{path} is {_OTHER_FILES[path.suffix]}, so it is not merged into. Give the model as safetensors."
        )
    return is_diffusers_folder(path) if path.is_dir() else released_checkpoint(path) is not None


def merge_pipeline(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | str,
    scale: float,
    family: str | None,
    overwrite: bool,
    say: Callable[[str], None],
    show: bool,
) -> tuple[Path, MergePlan]:
    """Merge and write; return where it is, and what was done.

    Args:
        base, adapter, out, dtype, scale, family, overwrite: as for `merge_checkpoint`.
        say: called with a line of what comes next.
        show: show a bar.

    Raises:
        RequestError, CheckpointError, UnsupportedError, MergeError, DoesNotFitError: as `merge_checkpoint` says. `out` is
            as it was.
    """
    from .formats.merging import plan_file
    from .formats.merging_folder import plan_folder

    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise RequestError(f"scale must be a number, got {scale!r}.")
    source, other = Path(base).expanduser(), Path(adapter).expanduser()
    one = source.is_file()
    place = checked_file(out, overwrite, (source, other)) if one else checked_folder(out, overwrite)
    if not one:
        _check_outside(place, source)
        check_apart(place, (source, other, other.parent, Path.cwd()))
    plan = (plan_file if one else plan_folder)(source, other, scale=scale, dtype=_dtype(dtype), family=family)
    check_space(place, plan.nbytes)
    say(f"merging {plan.layers} layers")
    with progress_bar("Merging", None if show else False) as report:
        done = _counter(report, plan.tensors)
        if one:
            write_file(place, lambda path: plan.files[source.name].write(path, done))
        else:
            _write_folder(plan, place, overwrite, done)
    return place, plan


def _write_folder(plan: MergePlan, place: Path, overwrite: bool, done: Callable[[str], None]) -> None:
    with new_folder(place, replace=overwrite) as stage:
        try:
            for name in (*plan.files, *plan.copies, *plan.texts):
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
            for name, file in plan.files.items():
                file.write(stage / name, done)
            for name, path in plan.copies.items():
                shutil.copyfile(path, stage / name)
            for name, text in plan.texts.items():
                (stage / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"Writing the merged model failed: {error}. What was there before is unchanged."
            ) from error


def _counter(report: Callable[[int, int, str], None] | None, total: int) -> Callable[[str], None]:
    count = 0

    def done(key: str) -> None:
        nonlocal count
        count += 1
        if report is not None:
            report(count, total, key)

    return done


def _check_outside(place: Path, source: Path) -> None:
    if place.is_relative_to(source.resolve()):
        raise RequestError(f"{place} lies in {source}, which is copied. Give a folder outside of it.")


def _dtype(dtype: torch.dtype | str) -> str | None:
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return None
    if name not in _DTYPES:
        raise RequestError(f"dtype must be 'auto' or one of {', '.join(_DTYPES)}, got {dtype!r}.")
    return name
