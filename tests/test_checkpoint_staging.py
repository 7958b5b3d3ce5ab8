"""A save happens as one act: whatever call fails, and whenever the process is killed."""

import contextlib
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_adapters import staging
from lora_adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from lora_adapters.errors import CheckpointError
from lora_adapters.staging import interrupted_config, remove_litter, write_files

CALLS = [(os, name) for name in ("mkdir", "open", "fsync", "replace", "rename", "link", "unlink", "chmod")]
CALLS += [(shutil, "rmtree"), (Path, "write_bytes")]


def writers(version, readme=False):
    files = [WEIGHTS_NAME, CONFIG_NAME] + ["README.md"] * readme
    return {name: lambda path, name=name: path.write_bytes(f"{name} {version}".encode()) and None for name in files}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def expected(version, **others):
    return {name: f"{name} {version}".encode() for name in (CONFIG_NAME, WEIGHTS_NAME)} | others


def litter(folder):
    return [path for parent in (folder, folder.parent) if parent.exists() for path in parent.glob("*-saving-*")]


class Fault:
    """Makes the n-th file-system call (and, if `lasting`, every later one) raise OSError."""

    def __init__(self, monkeypatch, n, lasting=False, code=errno.ENOSPC):
        self.count, self.n, self.lasting, self.code = 0, n, lasting, code
        for owner, name in CALLS:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, original):
        def call(*args, **kwargs):
            self.count += 1
            if self.count == self.n or (self.lasting and self.count > self.n):
                raise OSError(self.code, os.strerror(self.code))
            return original(*args, **kwargs)

        return call


@pytest.fixture(params=["missing", "empty", "trainer's", "earlier save", "earlier save, same config"])
def start(request, tmp_path):
    """A folder before the save, the version written into it, and what must be in it if the save fails."""
    folder = tmp_path / "run" / "out"
    if request.param != "missing":
        folder.mkdir(parents=True)
    if request.param in ("missing", "empty"):
        return folder, {}
    (folder / "optimizer.pt").write_bytes(b"state")
    if request.param == "trainer's":
        return folder, {}
    write_files(folder, writers(1))
    if request.param.endswith("same config"):
        (folder / CONFIG_NAME).write_bytes(f"{CONFIG_NAME} 2".encode())
    return folder, contents(folder)


def test_a_save_replaces_its_own_files_and_nothing_else(start):
    folder, _ = start
    others = {"optimizer.pt": b"state"} if folder.exists() and any(folder.iterdir()) else {}
    write_files(folder, writers(2))
    assert contents(folder) == expected(2, **others)
    assert not litter(folder)
    write_files(folder, writers(3, readme=True))
    assert contents(folder) == expected(3, **others) | {"README.md": b"README.md 3"}
    assert not litter(folder)


@pytest.mark.filterwarnings("ignore::lora_adapters.errors.LoraAdaptersWarning")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_when_the_nth_call_fails_the_earlier_files_stay_or_the_new_ones_are_complete(start, tmp_path, code):
    folder, before = start
    parent = folder.parent
    parent.mkdir(exist_ok=True)
    others = {"optimizer.pt": b"state"} if (folder / "optimizer.pt").exists() else {}
    backup = tmp_path / "backup"
    if folder.exists():
        shutil.copytree(folder, backup)
    for n in itertools.count(1):
        shutil.rmtree(parent)
        parent.mkdir()
        if backup.exists():
            shutil.copytree(backup, folder)
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, n, code=code)
            try:
                write_files(folder, writers(2))
                failed = False
            except CheckpointError:
                failed = True
        if failed:
            assert (contents(folder) if folder.exists() else {}) == others | before, n
        else:
            assert contents(folder) == expected(2, **others), n
        assert not litter(folder), n
        if fault.count < n:
            break
    assert n > 8


@pytest.mark.filterwarnings("ignore::lora_adapters.errors.LoraAdaptersWarning")
def test_when_every_call_from_the_nth_on_fails_a_reader_finds_one_save(start, tmp_path):
    folder, before = start
    parent = folder.parent
    parent.mkdir(exist_ok=True)
    backup = tmp_path / "backup"
    if folder.exists():
        shutil.copytree(folder, backup)
    for n in itertools.count(1):
        shutil.rmtree(parent)
        parent.mkdir()
        if backup.exists():
            shutil.copytree(backup, folder)
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, n, lasting=True)
            with contextlib.suppress(CheckpointError):
                write_files(folder, writers(2))
        assert seen(folder) in ({name: before[name] for name in before if "adapter" in name}, expected(2)), n
        write_files(folder, writers(3))
        assert seen(folder) == expected(3)
        assert not litter(folder), n
        if fault.count < n:
            break


def seen(folder):
    """Weights and config as a reader finds them."""
    if not (folder / WEIGHTS_NAME).exists():
        return {}
    config = interrupted_config(folder) or folder / CONFIG_NAME
    return {CONFIG_NAME: config.read_bytes(), WEIGHTS_NAME: (folder / WEIGHTS_NAME).read_bytes()}


KILLED = """
import os, signal, sys
from pathlib import Path
from lora_adapters import staging
at, count = int(sys.argv[2]), 0
def stop(original):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
for name in ("mkdir", "fsync", "replace", "rename", "link", "unlink", "rmdir", "open", "chmod"):
    setattr(os, name, stop(getattr(os, name)))
staging.write_files(Path(sys.argv[1]), {
    name: lambda path, name=name: path.write_bytes(f"{name} 2".encode()) and None
    for name in ("adapter_model.safetensors", "adapter_config.json")
})
"""


@pytest.mark.skipif(os.name == "nt", reason="kills with SIGKILL")
@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_before_any_call_leaves_one_save_and_the_next_one_leaves_no_litter(tmp_path, existing):
    waiting = False
    for at in itertools.count(1):
        folder = tmp_path / str(at) / "out"
        if existing:
            folder.mkdir(parents=True)
            (folder / "optimizer.pt").write_bytes(b"state")
            write_files(folder, writers(1))
        done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(at)], check=False)
        assert seen(folder) in (expected(1) if existing else {}, expected(2)), at
        waiting = waiting or bool(folder.exists() and interrupted_config(folder))
        remove_litter(folder)
        assert not litter(folder), at
        after = {name: data for name, data in contents(folder).items() if "adapter" in name} if folder.exists() else {}
        assert after in (expected(1) if existing else {}, expected(2)), at
        if done.returncode != -signal.SIGKILL:
            assert done.returncode == 0
            break
    assert at > 8
    assert waiting == existing  # One of the kills was between the two renames.


def test_a_running_save_is_left_alone(tmp_path):
    folder = tmp_path / "out"
    write_files(folder, writers(1))

    def meanwhile(path):
        remove_litter(folder)
        path.write_bytes(f"{WEIGHTS_NAME} 2".encode())

    write_files(folder, writers(2) | {WEIGHTS_NAME: meanwhile})
    assert contents(folder) == expected(2)


def test_an_error_of_the_writer_leaves_everything_as_it_was(tmp_path):
    folder = tmp_path / "out"
    write_files(folder, writers(1))

    def interrupted(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_files(folder, writers(2) | {CONFIG_NAME: interrupted})
    assert contents(folder) == expected(1)
    assert not litter(folder)


def test_a_folder_that_can_not_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(CheckpointError, match="failed"):
            write_files(folder, writers(1))
    assert (tmp_path / "file").read_text() == "x"


def test_links_in_the_folder_are_replaced_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (folder / name).symlink_to(outside)
    write_files(folder, writers(2))
    assert outside.read_bytes() == b"mine"
    assert contents(folder) == expected(2)
    assert not (folder / WEIGHTS_NAME).is_symlink()


def test_files_are_as_readable_as_their_folder(tmp_path):
    folder = tmp_path / "out"
    write_files(
        folder, writers(1) | {WEIGHTS_NAME: lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))}
    )
    mode = folder.stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}


def test_stages_count_as_dead_only_when_no_one_holds_them(tmp_path):
    stage = tmp_path / "stage"
    stage.mkdir()
    with staging._locked(stage), staging._taken_if_dead(stage) as dead:
        assert not dead
    with staging._taken_if_dead(stage) as dead:
        assert dead


@pytest.mark.skipif(os.name == "nt", reason="there a stage counts as dead after an hour")
def test_a_stage_that_another_save_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    original, removed = os.mkdir, []

    def mkdir(path, *args, **kwargs):
        original(path, *args, **kwargs)
        if not removed and "-saving-" in str(path):
            removed.append(path)
            remove_litter(folder)
            assert not Path(path).exists()

    monkeypatch.setattr(os, "mkdir", mkdir)
    write_files(folder, writers(1))
    assert removed
    assert contents(folder) == expected(1)
    assert not litter(folder)


def test_a_folder_that_another_process_filled_meanwhile_is_written_into(tmp_path):
    folder = tmp_path / "out"

    def meanwhile(path):
        if not folder.exists():
            write_files(folder, writers(1))
        path.write_bytes(f"{WEIGHTS_NAME} 2".encode())

    write_files(folder, writers(2) | {WEIGHTS_NAME: meanwhile})
    assert contents(folder) == expected(2)
    assert not litter(folder)
