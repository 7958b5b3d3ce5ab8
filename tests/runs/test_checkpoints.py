"""Which checkpoints a resumed run trusts: those whose files are all there, as long as they were."""

import json
import os

import pytest

from lora_adapters.runs.checkpoints import checkpoints, complete, is_complete, newest, prune, step_of


def checkpoint(root, step, done=True):
    """A folder as Trainer writes it."""
    folder = root / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"x" * 100)
    (folder / "sub" / "state.json").write_text("{}")
    if done:
        complete(folder)
    return folder


def test_a_checkpoint_is_whole_once_it_was_declared_so(tmp_path):
    folder = checkpoint(tmp_path, 5, done=False)
    assert not is_complete(folder)
    complete(folder)
    assert is_complete(folder)
    assert json.loads((folder / "complete.json").read_text()) == {"optimizer.pt": 100, "sub/state.json": 2}
    complete(folder)  # the list does not list itself
    assert "complete.json" not in json.loads((folder / "complete.json").read_text())


def cut(folder):
    os.truncate(folder / "optimizer.pt", 99)


def grown(folder):
    with open(folder / "optimizer.pt", "ab") as file:
        file.write(b"x")


def lost(folder):
    (folder / "sub" / "state.json").unlink()


def half_a_list(folder):
    text = (folder / "complete.json").read_text()
    (folder / "complete.json").write_text(text[: len(text) // 2])


def empty_list(folder):
    (folder / "complete.json").write_text("{}")


def list_of_another_kind(folder):
    (folder / "complete.json").write_text('["optimizer.pt"]')


def list_not_utf8(folder):
    (folder / "complete.json").write_bytes(b"\xff\xfe{}")


def list_that_is_a_folder(folder):
    (folder / "complete.json").unlink()
    (folder / "complete.json").mkdir()


@pytest.mark.parametrize(
    "damage",
    [cut, grown, lost, half_a_list, empty_list, list_of_another_kind, list_not_utf8, list_that_is_a_folder],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    older, folder = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    assert newest(tmp_path) == folder
    damage(folder)
    assert not is_complete(folder)
    assert newest(tmp_path) == older


def test_further_files_do_no_harm(tmp_path):
    folder = checkpoint(tmp_path, 5)
    (folder / "note.txt").write_text("mine")
    assert is_complete(folder)


def test_a_file_that_was_being_listed_does_not_count(tmp_path):
    """The list is renamed into place: what a kill leaves beside it is no list."""
    folder = checkpoint(tmp_path, 5, done=False)
    (folder / ".complete.json").write_text('{"optimizer.pt": 100}')
    assert not is_complete(folder)


def test_the_newest_is_the_highest_step_and_not_the_last_in_the_alphabet(tmp_path):
    for step in (100, 9, 20):
        checkpoint(tmp_path, step)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [100, 20, 9]
    assert step_of(newest(tmp_path)) == 100


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    assert checkpoints(tmp_path / "missing") == []
    assert newest(tmp_path / "missing") is None
    checkpoint(tmp_path, 5)
    (tmp_path / "checkpoint-7").write_text("a file")
    for name in ("checkpoint-best", "checkpoint-5-old", "notes"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5"]
    prune(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-5", "checkpoint-7", "checkpoint-best", "checkpoint-5-old", "notes"
    }  # fmt: skip


@pytest.mark.parametrize(("keep", "left"), [(1, [40]), (2, [20, 40]), (9, [10, 20, 40])])
def test_pruning_keeps_the_newest_whole_ones(tmp_path, keep, left):
    """One that is not whole is no use, and must not count as kept."""
    for step in (10, 20, 40):
        checkpoint(tmp_path, step)
    cut(checkpoint(tmp_path, 30))
    checkpoint(tmp_path, 50, done=False)
    prune(tmp_path, keep)
    assert sorted(step_of(path) for path in checkpoints(tmp_path)) == left
