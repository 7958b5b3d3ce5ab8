"""A whole folder appears, or takes another one's place, as one act: whatever call fails, and whenever it is killed."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_adapters import staging
from lora_adapters.errors import CheckpointError
from lora_adapters.staging import new_folder, remove_litter

CALLS = [(os, name) for name in ("mkdir", "open", "fsync", "rename", "chmod", "replace")]
OLD, NEW = {"old.txt": "old", "both.txt": "old"}, {"both.txt": "new", "sub/inner.txt": "new"}


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def write(folder, replace=True):
    with new_folder(folder, replace) as stage:
        fill(stage, NEW)


@pytest.fixture(params=["missing", "deep", "empty", "full"])
def start(request, tmp_path):
    """A place for the folder, and what it holds before."""
    folder = tmp_path / ("a/b/out" if request.param == "deep" else "out")
    if request.param in ("empty", "full"):
        folder.mkdir()
    if request.param == "full":
        fill(folder, OLD)
    return folder, OLD if request.param == "full" else {}


def everything(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_it_holds_what_the_block_wrote_and_nothing_else(start, tmp_path):
    folder, _ = start
    write(folder)
    assert contents(folder) == NEW
    assert [p for p in everything(tmp_path) if "saving" in p] == []


def test_files_are_as_readable_as_their_folder(tmp_path):
    with new_folder(tmp_path / "out") as stage:
        fill(stage, NEW)
        os.chmod(stage / "both.txt", 0o600)
    assert (tmp_path / "out/both.txt").stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666


def test_a_folder_with_files_is_replaced_only_when_asked(tmp_path):
    fill(tmp_path / "out", OLD)
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match="meanwhile"):
        write(tmp_path / "out", replace=False)
    assert (everything(tmp_path), contents(tmp_path / "out")) == (before, OLD)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError("x")])
def test_an_error_of_the_block_is_passed_on_and_changes_nothing(start, tmp_path, error):
    folder, old = start
    before = everything(tmp_path)
    with pytest.raises(type(error)), new_folder(folder, replace=True) as stage:
        fill(stage, NEW)
        raise error
    assert everything(tmp_path) == before
    assert contents(folder) == old if folder.exists() else not old


class Fault:
    """Raises in place of the n-th file-system call."""

    def __init__(self, patch, n):
        self.count, self.n = 0, n
        for owner, name in CALLS:
            patch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, original):
        def call(*args, **kwargs):
            self.count += 1
            if self.count == self.n:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(*args, **kwargs)

        return call


@pytest.mark.filterwarnings("ignore:.*the disk did not confirm")
def test_whichever_call_fails_the_old_folder_stays_or_the_new_one_is_complete(start, tmp_path):
    folder, old = start
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-backup")
    before = everything(tmp_path)
    failed, n = 0, 0
    while True:
        n += 1
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, n)
            try:
                write(folder)
                complete = True
            except (CheckpointError, OSError):  # an OSError of the block's own calls is passed on
                complete = False
        assert complete or fault.count >= n
        failed += not complete
        if complete:
            assert contents(folder) == NEW, n
        else:
            assert everything(tmp_path) == before, n
            assert (contents(folder) if folder.exists() else {}) == old, n
        if fault.count < n:
            break
        shutil.rmtree(tmp_path)
        shutil.copytree(tmp_path.parent / f"{tmp_path.name}-backup", tmp_path)
    assert failed >= 5


KILL = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_new_folder import CALLS, write
count = 0
def wrap(original):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == {at}:
            os.kill(os.getpid(), 9)
        return original(*args, **kwargs)
    return call
for owner, name in CALLS:
    setattr(owner, name, wrap(getattr(owner, name)))
write(Path({folder!r}))
"""


def test_a_kill_before_any_call_leaves_one_of_the_two_and_the_next_call_leaves_no_litter(tmp_path):
    outcomes, at = [], 0
    while not outcomes or outcomes[-1] != "done":
        at += 1
        folder = tmp_path / str(at) / "out"
        fill(folder, OLD)
        code = KILL.format(tests=str(Path(__file__).parent), at=at, folder=str(folder))
        ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        remove_litter(folder)
        assert contents(folder) in (OLD, NEW), at
        assert [p.name for p in folder.parent.iterdir()] == ["out"], at
        outcomes.append("done" if ended.returncode == 0 else "new" if contents(folder) == NEW else "old")
    assert {"old", "new"} <= set(outcomes)


def test_a_running_one_is_left_alone(tmp_path):
    with new_folder(tmp_path / "out") as stage:
        fill(stage, NEW)
        remove_litter(tmp_path / "out")
        assert contents(stage) == NEW
    assert contents(tmp_path / "out") == NEW


def test_when_the_old_folder_can_not_be_put_back_nothing_is_lost(tmp_path, monkeypatch):
    """The second rename and the one that undoes the first fail: the next call finishes the act."""
    fill(tmp_path / "out", OLD)
    rename, count = os.rename, 0

    def fails_after_the_first(*args, **kwargs):
        nonlocal count
        count += 1
        if count > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(*args, **kwargs)

    monkeypatch.setattr(staging.os, "rename", fails_after_the_first)
    with pytest.raises(CheckpointError):
        write(tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    remove_litter(tmp_path / "out")
    assert contents(tmp_path / "out") == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
