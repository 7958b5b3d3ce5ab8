"""A run's folder: when a run may begin in it, what is kept, and what a killed run leaves."""

import json
import math
import os
import subprocess
import sys

import pytest

from lora_adapters.errors import CheckpointError, RequestError, StateError
from lora_adapters.report.facts import AdaptedGroup, DataFacts, RunFacts, Sample, SkippedGroup, Table
from lora_adapters.runs.folder import RunFolder, finite


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def ran(folder, status="finished", adapter=True, checkpoint=False):
    """Leave what a run leaves."""
    folder.path.mkdir(exist_ok=True)
    folder.write_facts(RunFacts("causal-lm", "base", status=status))
    if adapter:
        folder.adapter.mkdir()
    if checkpoint:
        (folder.checkpoints / "checkpoint-5").mkdir(parents=True)


# ---- check -----------------------------------------------------------------------------------------------------------


def test_a_new_or_empty_folder(folder):
    folder.check(resume=False, overwrite=False)
    assert not folder.path.exists()  # checking changes nothing
    folder.path.mkdir()
    folder.check(resume=False, overwrite=False)
    with pytest.raises(RequestError, match=r"there is no run in .*leave resume out"):
        folder.check(resume=True, overwrite=False)


@pytest.mark.parametrize("wish", [{}, {"resume": True}, {"overwrite": True}])
def test_no_run_ever_takes_a_folder_with_other_things_in_it(folder, wish):
    wish = {"resume": False, "overwrite": False} | wish
    folder.path.mkdir()
    (folder.path / "thesis.tex").write_text("")
    with pytest.raises(RequestError, match="holds other files and no run"):
        folder.check(**wish)
    ran(folder, status="interrupted")
    with pytest.raises(RequestError, match=r"also holds 'thesis.tex'"):
        folder.check(**wish)


@pytest.mark.parametrize("kept", ["adapter", "checkpoint"])
def test_an_earlier_run_makes_way_only_if_told(folder, kept):
    ran(folder, adapter=kept == "adapter", checkpoint=kept == "checkpoint")
    with pytest.raises(RequestError, match="resume=true to go on with it, overwrite=true to replace it"):
        folder.check(resume=False, overwrite=False)
    folder.check(resume=False, overwrite=True)


def test_a_run_that_trained_nothing_is_in_nobodys_way(folder):
    ran(folder, status="failed", adapter=False)
    folder.check(resume=False, overwrite=False)


@pytest.mark.parametrize("status", ["running", "interrupted", "diverged", "failed"])
def test_what_can_be_resumed(folder, status):
    ran(folder, status=status)
    folder.check(resume=True, overwrite=False)


def test_a_finished_run_has_nothing_to_resume(folder):
    ran(folder)
    with pytest.raises(RequestError, match="finished: there is nothing to resume"):
        folder.check(resume=True, overwrite=False)


def test_a_run_whose_facts_are_damaged(folder):
    ran(folder)
    (folder.path / "facts.json").write_text('{"task": ')
    with pytest.raises(CheckpointError, match="damaged"):
        folder.check(resume=True, overwrite=False)
    folder.check(resume=False, overwrite=True)


def test_what_a_killed_run_left_half_written_is_in_nobodys_way(folder):
    ran(folder, status="running")
    (folder.path / ".facts.json.new").write_text("{")
    (folder.path / ".adapter.lora_adapters-saving-1a2b").mkdir()
    folder.check(resume=True, overwrite=False)
    folder.check(resume=False, overwrite=True)
    folder.clear()
    assert list(folder.path.iterdir()) == []


def test_a_file_or_a_place_in_a_file(folder):
    folder.path.write_text("")
    with pytest.raises(RequestError, match="is a file: give another folder"):
        folder.check(resume=False, overwrite=False)
    below = RunFolder(folder.path / "deeper")
    with pytest.raises(RequestError, match=r"can't be written: Not a directory\. Give another folder"):
        with below.locked():
            pass


def as_nobody(tmp_path, statement):
    """Run a statement on a folder in a process that may not write to it, whoever runs the tests."""
    code = (
        "import os, sys; from lora_adapters.runs.folder import RunFolder; os.geteuid() or os.seteuid(65534)\n"
        f"folder = RunFolder(sys.argv[1])\n{statement}"
    )
    return subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("mode", "statement"),
    [(0o000, "folder.check(resume=False, overwrite=False)"), (0o555, "folder.locked().__enter__()")],
)
def test_a_folder_that_may_not_be_read_or_written(tmp_path, mode, statement):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(mode)
    try:
        done = as_nobody(closed, statement)
    finally:
        closed.chmod(0o755)
    assert "RequestError: output" in done.stderr
    assert "can't be written: Permission denied. Give another folder." in done.stderr


# ---- locked, clear ---------------------------------------------------------------------------------------------------


def test_two_processes_can_not_run_in_one_folder(folder):
    code = (
        "import sys; from lora_adapters.runs.folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).locked(): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(StateError, match="Another run is at work"):
            with folder.locked():
                pass
        other.kill()  # the lock goes with its process, and leaves nothing behind
    with folder.locked():
        assert list(folder.path.iterdir()) == []
    with folder.locked():
        pass


def test_the_lock_is_given_back_after_an_error(folder):
    with pytest.raises(ZeroDivisionError), folder.locked():
        1 / 0  # noqa: B018
    with folder.locked():
        pass


def test_clearing_takes_a_runs_own_files_only(folder, tmp_path):
    ran(folder, checkpoint=True)
    folder.append({"step": 1})
    (folder.path / "mine.txt").write_text("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    (folder.path / "logs").symlink_to(elsewhere)
    folder.clear()
    assert [path.name for path in folder.path.iterdir()] == ["mine.txt"]
    assert (elsewhere / "kept").exists()


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def lines(folder):
    return (folder.path / "metrics.jsonl").read_bytes()


def test_numbers_that_are_not_finite_come_back(folder):
    folder.path.mkdir()
    folder.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "good": 0.5})
    json.loads(lines(folder), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    (row,) = folder.history()
    assert math.isnan(row.pop("loss"))
    assert row == {"step": 1, "grad_norm": math.inf, "low": -math.inf, "good": 0.5}
    folder.rewind(1)
    (row,) = folder.history()
    assert math.isnan(row["loss"])


def test_no_metrics_yet(folder):
    assert folder.history() == []
    folder.path.mkdir()
    folder.rewind(0)
    assert folder.history() == []


def test_rewinding_drops_what_lies_after_the_step(folder):
    folder.path.mkdir()
    for step in (1, 2, 3, 4):
        folder.append({"step": step, "loss": 1.0 / step})
    folder.append({"note": "without a step"})
    folder.rewind(2)
    assert [row.get("step") for row in folder.history()] == [1, 2, None]
    folder.rewind(0)
    assert folder.history() == [{"note": "without a step"}]


@pytest.mark.parametrize("half", [b'{"step": 2, "lo', b"{", '{"note": "ü'.encode()[:-1], b"\x00\x00\x00"])
def test_a_last_line_that_a_killed_run_left_half_written(folder, half):
    folder.path.mkdir()
    folder.append({"step": 1})
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(half)
    assert folder.history() == [{"step": 1}]
    folder.rewind(1)  # as a resumed run does before it appends
    folder.append({"step": 2})
    assert folder.history() == [{"step": 1}, {"step": 2}]


def test_a_last_line_that_lacks_its_end_only(folder):
    folder.path.mkdir()
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert folder.history() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("damage", ['{"step": ', "", "[1]", "7", '"text"'])
def test_a_damaged_line_is_told_with_its_number(folder, damage):
    folder.path.mkdir()
    (folder.path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    with pytest.raises(CheckpointError, match="line 2 is no JSON object"):
        folder.history()


@pytest.mark.parametrize("text", ["\ud800 half", "half \udfff", "\u2028 \x85 \x0c", "漢字 🙂", 'quotes " \\ \n'])
def test_any_text_goes_through_the_files(folder, text):
    """Data may hold half a surrogate pair, or what Unicode takes for the end of a line."""
    folder.path.mkdir()
    folder.append({"step": 1, "text": text})
    folder.append({"step": 2})
    assert folder.history() == [{"step": 1, "text": text}, {"step": 2}]
    facts = RunFacts("causal-lm", "base", samples=[Sample(text, [("prompt", text)])])
    folder.write_facts(facts)
    assert folder.facts() == facts


# ---- facts.json ------------------------------------------------------------------------------------------------------


def test_facts_come_back_as_they_were(folder):
    folder.path.mkdir()
    facts = RunFacts(
        "causal-lm",
        "base",
        status="diverged",
        data=[DataFacts("train", "a.jsonl", 3, {"tokens": 7, "form": "text"})],
        adapted=[AdaptedGroup("q", "layers.*.q", 2, [8, 8], 4, 1.0, "dense", 256, "this package")],
        skipped=[SkippedGroup("head", "lm_head", 1, "not asked for")],
        before={"loss": math.inf, "accuracy": 0.5},
        after={"loss": -math.inf},
        samples=[Sample("one", [("a", "b")], [("picture", "aGk=")])],
        tables=[Table("t", ["a"], [[1.5], ["x"]])],
        resumed_from=[0, 5],
    )
    folder.write_facts(facts)
    assert folder.facts() == facts
    facts.before = {"loss": math.nan}
    folder.write_facts(facts)
    assert math.isnan(folder.facts().before["loss"])
    assert json.loads((folder.path / "environment.json").read_text()) == {}


def test_facts_of_a_later_version(folder):
    folder.path.mkdir()
    folder.write_facts(RunFacts("causal-lm", "base"))
    raw = json.loads((folder.path / "facts.json").read_text())
    (folder.path / "facts.json").write_text(json.dumps(raw | {"weather": "fine"}))
    assert folder.facts() == RunFacts("causal-lm", "base")


def test_facts_are_written_whole_or_not_at_all(folder):
    """A write that fails midway leaves the old file."""
    folder.path.mkdir()
    folder.write_facts(RunFacts("causal-lm", "base"))
    before = (folder.path / "facts.json").read_bytes()
    code = (
        "import resource, signal, sys; from lora_adapters.runs.folder import RunFolder\n"
        "from lora_adapters.report.facts import RunFacts\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        "RunFolder(sys.argv[1]).write_facts(RunFacts('seq2seq', 'other'))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True, check=False)
    assert "File too large" in done.stderr
    assert (folder.path / "facts.json").read_bytes() == before
    assert os.path.getsize(folder.path / ".facts.json.new") <= 64


def test_finite_makes_plain_json(folder):
    value = {"a": [math.nan, (1.0, -math.inf)], 3: {"b": math.inf}, "c": None, "d": True}
    assert finite(value) == {"a": ["nan", [1.0, "-inf"]], "3": {"b": "inf"}, "c": None, "d": True}
