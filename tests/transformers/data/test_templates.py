"""Templates: what they fill, what they leave out, and what they say of a wrong name."""

import pytest
from lora_adapters_transformers.data.templates import Template

from lora_adapters.errors import RequestError

COLUMNS = ["question", "answer", "a.b"]


@pytest.mark.parametrize(
    "text, row, filled",
    [
        ("question", {"question": "Why?"}, "Why?"),
        ("{question}\n{answer}", {"question": "Why?", "answer": 42}, "Why?\n42"),
        ("{{{question}}} {{}}", {"question": "x"}, "{x} {}"),
        ("{question}{question}", {"question": "{answer}"}, "{answer}{answer}"),
        ("a.b", {"a.b": True}, "true"),
        ("{a.b}", {"a.b": 1.5}, "1.5"),
        ("Q: {question}", {"question": "  kept  "}, "Q:   kept  "),
        ("question", {"question": None}, None),
        ("question", {"question": " \n"}, None),
        ("{question} {answer}", {"question": "x", "answer": ""}, None),
        ("question", {"question": 0}, "0"),
        ("question", {"question": False}, "false"),
    ],
)
def test_fills(text, row, filled):
    assert Template(text, COLUMNS).fill(row) == filled


def test_a_column_whose_name_has_braces_is_that_column():
    assert Template("{x}", ["{x}", "x"]).fill({"{x}": "this", "x": "that"}) == "this"


@pytest.mark.parametrize(
    "text, message",
    [
        ("quesion", r"data\.text: no column 'quesion'; did you mean 'question'\? Columns: a\.b, answer, question$"),
        ("Question", "did you mean 'question'"),
        ("{Answr}", "no column 'Answr'; did you mean 'answer'"),
        ("zzz", r"no column 'zzz'\. Columns"),
        ("{x[0]}", "only plain column names"),
        ("{y:>10}", "only plain column names"),
        ("{}", "no column ''"),
        ("{question", "'{' at character 1 .* has no partner"),
        ("question}", "'}' at character 9 .* has no partner"),
        ("{{question}}", "names no column"),
    ],
)
def test_says_what_is_wrong(text, message):
    with pytest.raises(RequestError, match=message) as caught:
        Template(text, COLUMNS, "data.text")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a"])
def test_a_value_that_is_no_text(value):
    with pytest.raises(RequestError, match="column 'question' holds"):
        Template("question", COLUMNS).fill({"question": value})
