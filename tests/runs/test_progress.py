"""What a person sees of a run: some lines in a log, a bar in a terminal, nothing when quiet."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from lora_adapters.runs.progress import Progress, duration


def test_a_log_gets_some_lines_and_the_last_step(capsys):
    progress = Progress()
    progress.start("training", 1000)
    for step in range(1, 1001):
        progress.update(step, loss=1 / step)
    out, err = capsys.readouterr()
    assert out == ""
    shown = err.splitlines()
    assert 15 <= len(shown) <= 25
    assert shown[-1].startswith("training 1000/1000  loss 0.001 ")


def test_a_short_run_gets_a_line_per_step(capsys):
    progress = Progress()
    progress.start("training", 3)
    for step in (1, 2, 3):
        progress.update(step)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/3", "2/3", "3/3"]


def test_a_resumed_run_goes_on_where_it_was(capsys):
    progress = Progress()
    progress.start("training", 100, done=90)
    for step in range(91, 101):
        progress.update(step)
    shown = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in shown] == [f"{step}/100" for step in range(91, 101)]


def test_a_run_with_nothing_left_to_do(capsys):
    progress = Progress()
    progress.start("training", 100, done=100)
    progress.update(100, rates={"tokens": 0.0})
    progress.stop()
    assert "left" not in capsys.readouterr().err


def test_the_time_left_is_that_of_the_steps_of_this_part(monkeypatch):
    """Steps that an earlier part did take no time now."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress()
    progress.start("training", 100, done=80)
    now += 10.0
    assert "0:10 left" in progress.details(90, None, {}, {})
    now += 50.0
    assert "0:40 left" in progress.details(92, None, {}, {})


def test_the_details():
    progress = Progress()
    progress.start("training", 10)
    line = progress.details(
        0, 3 * 2**30, {"tokens": 12345.6, "rows": 0.123}, {"loss": 1.23456, "grad_norm": float("nan")}
    )
    assert line == "loss 1.235 · grad norm nan · 12,346 tokens/s · 0.12 rows/s · 3.0 GiB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (6.6, "0:07"), (59.6, "1:00"), (754, "12:34"), (3599.7, "1:00:00"), (3723, "1:02:03")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_quiet_says_nothing(capsys):
    progress = Progress(quiet=True)
    progress.say("loading")
    progress.start("training", 2)
    progress.update(1, loss=1.0)
    progress.stop()
    assert capsys.readouterr() == ("", "")


def in_a_terminal(statements):
    """Run statements in a process whose stderr is a terminal; return what it shows and what goes to stdout."""
    ours, theirs = pty.openpty()
    code = f"from lora_adapters.runs.progress import Progress\nprogress = Progress()\n{statements}"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        shown += part
    out, _ = process.communicate()
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode(), out


def test_a_terminal_gets_a_bar_that_goes_away():
    shown, out = in_a_terminal(
        "progress.start('training', 4)\n"
        "progress.update(1, loss=1.5)\n"
        "progress.say('[bold] saved to run[/bold]')\n"
        "progress.update(3, loss=0.5, memory=2**30)\n"
        "progress._bar.refresh()\n"
        "progress.stop()\nprogress.say('done')"
    )
    assert out == b""
    assert "training" in shown
    assert "3/4" in shown
    assert "loss 0.5" in shown
    assert "[bold] saved to run[/bold]" in shown  # a line, not markup
    assert "\x1b[?25h" in shown.split("3/4")[-1]  # the cursor is shown again
    assert re.search(r"\x1b\[2K[^─━]*done\r\n$", shown)


def test_a_second_stretch_takes_the_place_of_the_first(capsys):
    progress = Progress()
    progress.start("measuring", 1)
    progress.start("training", 1)
    progress.update(1)
    assert capsys.readouterr().err.startswith("training 1/1")
