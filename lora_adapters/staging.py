"""Writes files as one act: all of a save or nothing, whatever fails or is killed in between.

`write_files` writes an adapter's files. A folder that does not exist, or is empty, is built beside its place and renamed
into it. In a folder that holds other files, such as a Trainer's checkpoint, the files are first completed in a hidden
stage inside it; then the weights are renamed over their predecessor, which commits the save, then the config. If the
second rename fails, the old weights are put back. If the process is killed between the two, the stage still holds the
config of the weights now in place: reads take it from there (`interrupted_config`), the next write finishes the act and
removes the stage. A running save locks its stage, so that only dead ones are removed.

`write_file` writes a single file, completed in such a stage beside its place.

`new_folder` makes a whole folder, which may take the place of another one: that one is moved into the stage, then the new
one out of it. If the second rename fails, the old folder is put back. If the process is killed between the two, the next
call finishes the act.
"""

from __future__ import annotations

import errno
import filecmp
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .adapter_config import CONFIG_NAME, WEIGHTS_NAME
from .errors import CheckpointError, LoraAdaptersWarning

try:
    import fcntl
except ImportError:  # Windows has no flock; there a stage counts as dead after an hour.
    fcntl = None

_MARK = ".lora_adapters-saving-"
_OLD, _NEW = "previous", "new"
_DEAD_AFTER_SECONDS = 3600

#: File name -> function that writes that file at the path it is given.
Writers = Mapping[str, Callable[[Path], None]]


def write_files(folder: Path, writers: Writers) -> None:
    """Write an adapter's files into `folder` as one act.

    Args:
        folder: made if missing, with its parents. Files of other names in it stay.
        writers: must hold adapter_model.safetensors and adapter_config.json.

    Raises:
        CheckpointError: writing failed (disk full, no permission, ...). The files are as they were before.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_litter(folder)
        if not _build(folder, writers):
            with _stage(folder, _MARK) as stage:
                _fill(stage, writers)
                _replace(stage, folder, writers)
        _sync_or_warn(folder)
    except OSError as error:
        state = "What was there before is unchanged."
        if interrupted_config(folder):
            state = "The new weights are in place, and the next restore or save there completes the rest."
        raise CheckpointError(
            f"Saving to {folder} failed: {error}. {state} Free space or choose another folder, then save again."
        ) from error


def write_file(path: Path, writer: Callable[[Path], None]) -> None:
    """Write one file as one act: completed beside its place, then renamed into it.

    Args:
        path: replaced if it is there; its folder is made if missing.
        writer: writes the file at the path it is given.

    Raises:
        CheckpointError: writing failed (disk full, no permission, ...). What was there before is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_litter(path)
        with _stage(path.parent, _beside(path)) as stage:
            writer(stage / path.name)
            _complete(stage / path.name)
            os.replace(stage / path.name, path)
        _sync_or_warn(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"Writing {path} failed: {error}. What was there before is unchanged. Free space or choose another place."
        ) from error


@contextmanager
def new_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; when the block ends without an exception it takes that place, as one act.

    Args:
        folder: made with its parents. It must not exist or be empty, unless it may be replaced.
        replace: let a folder with files in it make way, once the new one is complete.

    Raises:
        CheckpointError: `folder` can't be written. As after an exception in the block, everything is as it was before.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        with ExitStack() as stack:
            with _failures(folder):
                folder.parent.mkdir(parents=True, exist_ok=True)
                remove_litter(folder)
                stage = stack.enter_context(_stage(folder.parent, _beside(folder)))
                os.mkdir(stage / _NEW)
            yield stage / _NEW
            with _failures(folder):
                _settle(stage / _NEW)
                _swap(stage, folder, replace)
        _sync_or_warn(folder)
    except BaseException:
        for parent in made:
            with suppress(OSError):  # Somebody else may use it by now.
                parent.rmdir()
        raise


@contextmanager
def _failures(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"Writing {folder} failed: {error}. What was there before is unchanged. Free space or choose another folder."
        ) from error


def _settle(folder: Path) -> None:
    """Make all that lies in a folder as readable as the folder, and put it on the disk."""
    for path, _, names in os.walk(folder):
        for name in names:
            _complete(Path(path, name))
        _sync_folder(Path(path))


def _swap(stage: Path, folder: Path, replace: bool) -> None:
    if os.path.lexists(folder) and any(folder.iterdir()):
        if not replace:
            raise OSError(errno.EEXIST, "another program has put files there meanwhile")
        try:
            os.rename(folder, stage / _OLD)
            os.rename(stage / _NEW, folder)
        except BaseException:
            _undo_swap(stage, folder)
            raise
    else:
        if os.name == "nt" and folder.exists():
            folder.rmdir()  # Windows can't rename over an empty folder.
        os.rename(stage / _NEW, folder)


def _undo_swap(stage: Path, folder: Path) -> None:
    if _swapping(stage):
        os.rename(stage / _OLD, folder)


def _swapping(stage: Path) -> bool:
    """Return True between the two renames: the old folder is in the stage, and the complete new one still is."""
    return (stage / _NEW).is_dir() and (stage / _OLD).is_dir()


def _build(folder: Path, writers: Writers) -> bool:
    """Put a whole folder in place. Returns False if other files are there already."""
    if folder.exists() and any(folder.iterdir()):
        return False
    with _stage(folder.parent, _beside(folder)) as stage:
        _fill(stage, writers)
        try:
            if os.name == "nt" and folder.exists():
                folder.rmdir()  # Windows can't rename over an empty folder.
            os.rename(stage, folder)
        except OSError as error:
            # Another process was first: in a distributed run, scripts let every process save.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
    return True


def _beside(folder: Path) -> str:
    return f".{folder.name}{_MARK}"


@contextmanager
def _stage(parent: Path, prefix: str) -> Iterator[Path]:
    while True:
        stage = parent / f"{prefix}{secrets.token_hex(8)}"
        os.mkdir(stage)
        try:
            with _locked(stage):
                # Another save may have found it before it was locked, and removed it as a dead one.
                if stage.exists():
                    yield stage
                    return
        finally:
            if not (_waiting(stage) or _swapping(stage)):
                _remove(stage)


def _remove(stage: Path) -> None:
    for _ in range(2):  # One passing I/O error must not leave litter.
        with suppress(OSError):
            shutil.rmtree(stage)
        if not stage.exists():
            return


@contextmanager
def _locked(stage: Path) -> Iterator[None]:
    """Hold the stage's lock, so that other saves leave it alone."""
    if fcntl is None:
        yield
        return
    try:
        handle = os.open(stage, os.O_RDONLY)
    except FileNotFoundError:
        yield
        return
    try:
        with suppress(OSError):  # Some network file systems have no locks.
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _taken_if_dead(stage: Path) -> Iterator[bool]:
    """Yield True if no running save owns the stage; its lock is held meanwhile, so that none starts to."""
    try:
        if stage.is_symlink() or not stage.is_dir():
            handle, dead = None, False
        elif fcntl is None:
            handle, dead = None, time.time() - stage.stat().st_mtime > _DEAD_AFTER_SECONDS
        else:
            handle, dead = os.open(stage, os.O_RDONLY), True
    except OSError:
        handle, dead = None, False
    try:
        if handle is not None and fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                dead = False
        yield dead
    finally:
        if handle is not None:
            os.close(handle)


def _fill(stage: Path, writers: Writers) -> None:
    # The weights come first: a stage with a config but no weights is one whose weights were renamed into place.
    for name in sorted(writers, key=lambda name: name != WEIGHTS_NAME):
        writers[name](stage / name)
        _complete(stage / name)
    _sync_folder(stage)


def _complete(path: Path) -> None:
    # safetensors makes its files 0600; a checkpoint must be as readable as its folder.
    os.chmod(path, os.stat(path.parent).st_mode & 0o666)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # This file system can't sync folders.
            raise
    finally:
        os.close(handle)


def _sync_or_warn(folder: Path) -> None:
    try:
        _sync_folder(folder)
        _sync_folder(folder.parent)
    except OSError as error:
        warnings.warn(
            f"{folder} was saved, but the disk did not confirm it ({error}): it may not survive a power cut.",
            LoraAdaptersWarning,
            stacklevel=4,
        )


def _replace(stage: Path, folder: Path, names: Writers) -> None:
    """Rename the staged files over those in `folder`; put the old weights back if the config can't follow them."""
    weights, config, old = folder / WEIGHTS_NAME, folder / CONFIG_NAME, stage / _OLD
    unchanged = not config.is_symlink() and config.is_file() and filecmp.cmp(stage / CONFIG_NAME, config, shallow=False)
    if unchanged:  # Then a single rename replaces all that matters.
        os.unlink(stage / CONFIG_NAME)
    if os.path.lexists(weights):
        os.mkdir(old)
        _keep(weights, old / WEIGHTS_NAME)
    os.replace(stage / WEIGHTS_NAME, weights)
    try:
        if not unchanged:
            os.replace(stage / CONFIG_NAME, config)
    except BaseException:
        if old.exists():
            os.replace(old / WEIGHTS_NAME, weights)
        else:
            os.replace(weights, stage / WEIGHTS_NAME)
        raise
    for name in names.keys() - {WEIGHTS_NAME, CONFIG_NAME}:
        try:
            os.replace(stage / name, folder / name)
        except OSError as error:
            warnings.warn(f"{folder / name} was not updated: {error}.", LoraAdaptersWarning, stacklevel=4)


def _keep(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(path, copy, follow_symlinks=False)


def _waiting(stage: Path) -> bool:
    """Return True if the stage's weights were renamed into place (and not put back) while its config still waits."""
    if not (stage / CONFIG_NAME).exists() or (stage / WEIGHTS_NAME).exists():
        return False
    return not (stage / _OLD).exists() or os.path.lexists(stage / _OLD / WEIGHTS_NAME)


def _stages(parent: Path, prefix: str) -> list[Path]:
    try:
        return [path for path in parent.iterdir() if path.name.startswith(prefix) and not path.is_symlink()]
    except OSError:
        return []


def interrupted_config(folder: Path) -> Path | None:
    """Config of a save that ended after its weights were renamed into `folder`, else None. Changes nothing."""
    return next((stage / CONFIG_NAME for stage in _stages(folder, _MARK) if _waiting(stage)), None)


def remove_litter(folder: Path) -> None:
    """Finish a save that was killed while it put its files in place, and remove what killed saves left behind."""
    for stage in _stages(folder, _MARK):
        with _taken_if_dead(stage) as dead:
            if dead and _waiting(stage):
                os.replace(stage / CONFIG_NAME, folder / CONFIG_NAME)
            if dead:
                _remove(stage)
    for stage in _stages(folder.parent, _beside(folder)):
        with _taken_if_dead(stage) as dead:
            if dead and _swapping(stage) and not os.path.lexists(folder):
                os.rename(stage / _NEW, folder)
            if dead and not _swapping(stage):
                _remove(stage)
