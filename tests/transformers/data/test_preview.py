"""What is shown of an example: the right spans, and nothing in the data obeyed."""

import io
import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_adapters_transformers.data.preview import preview, show
from small_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer(bos=True, eos=True)


def test_spans():
    before, after = TOKENIZER("Why?")["input_ids"][:-1], TOKENIZER(" Because.\n")["input_ids"][1:]
    row = {"input_ids": before + after, "labels": [-100] * len(before) + after}
    assert preview(row, TOKENIZER) == [("<s>Why?", False), (" Because.\n</s>", True)]


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="ascii")), st.data())
def test_spans_join_to_the_text(text, data):
    ids = TOKENIZER(text)["input_ids"]
    flags = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    spans = preview(
        {"input_ids": ids, "labels": [i if f else -100 for i, f in zip(ids, flags, strict=True)]}, TOKENIZER
    )
    assert "".join(span for span, _ in spans) == TOKENIZER.decode(ids)
    assert all(a[1] != b[1] for a, b in itertools.pairwise(spans))


def test_in_a_pipe(capsys):
    show([("a\x1b[31m[bold]b[/bold]\n\tc", False), ("d [loss] \u202e", True)], title="One")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "One:\na\\x1b[31m[bold]b[/bold]⏎\n⇥       c[loss]d \\[loss] \\u202e[/loss]\n"


def test_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    show([("prompt [red]", False), ("answer\x07", True)])
    assert "\x1b[2mprompt [red]\x1b[0m" in terminal.getvalue()
    assert "\x1b[1;32manswer\\x07\x1b[0m" in terminal.getvalue()


def test_long_spans_lose_their_middle(capsys):
    show([("x" * 5000 + "end", False), ("answer", True)])
    err = capsys.readouterr().err
    assert "3803 more characters" in err
    assert "end[loss]answer[/loss]" in err
    assert len(err) < 2000


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_the_characters(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding=encoding))
    show([("é🙂\n", False), ("answer", True)])
    sys.stderr.flush()
    assert "\\U0001f642" in raw.getvalue().decode(encoding)
    assert "answer" in raw.getvalue().decode(encoding)
