"""report.html: everything in it, nothing fetched, every text escaped, whatever the history holds."""

import json
import math
import re
from html.parser import HTMLParser

import matplotlib
import pytest

from lora_adapters.report.charts import charts
from lora_adapters.report.facts import AdaptedGroup, DataFacts, RunFacts, Sample, SkippedGroup, Table
from lora_adapters.report.html import changes, key_numbers, memory_bars, render_report
from lora_adapters.report.readable import duration, number, share

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags with their attributes, and the text of a page, as it is and with a space at each tag."""

    VOID = {"meta", "link", "img", "wbr", "br", "hr", "input"}

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = self.spaced = ""
        self.feed(html)
        self.close()
        assert self.open == [], "tags are not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.spaced += "" if tag == "wbr" else " "
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.spaced += " "

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
            self.spaced += data


def lines(drawing: str, colour: int = 1) -> list[str]:
    """Return the path data of the curves in this colour."""
    found = re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', drawing)
    return [data for data, style in found if "fill: none" in style and f"stroke: var(--line-{colour})" in style]


def marks(drawing: str, colour: int = 1) -> int:
    return len(re.findall(rf'<use [^>]*style="fill: var\(--line-{colour}\)', drawing))


def test_holds_every_fact(make_facts, make_history):
    text = " ".join(Page(render_report(make_facts(), make_history())).spaced.split())
    for expected in (
        "causal-lm",
        "org/model-1b",
        "finished",
        "2026-01-31 12:05 UTC",
        "Steps 2,000 of 2,000",
        "Training time 1 h 12 min",
        "Tokens per second 4,211",
        "0.76 %",
        "36.1 MiB",
        "loss 2.414 1.102 -1.312 (-54.3 %) better",
        "rougeL 0.2134 0.1471 -0.0663 (-31.1 %) worse",
        "accuracy 0.75 0.75 ±0 same",
        "Learning rate",
        "Gradient norm",
        "Adapter norm",
        "Weights 774.4 MiB",
        "Measured peak 2.8 GiB",
        "data/tickets.jsonl",
        "rows too long 41 cut at 1024",
        "model.layers.*.self_attn.q_proj 24 2048 \N{MULTIPLICATION SIGN} 2048 16 1 nf4 48.0 MiB this package",
        "lm_head 1 heads are left alone unless targets name them",
        "Trained and saved whole: model.norm",
        "q, k and v share one input.",
        "Ticket 4711",
        "print(i)",
        "Confusion matrix",
        "learning_rate: 0.0002",
        "alpha: null",
        "a GPU, 16 GiB",
    ):
        assert expected in text


@pytest.mark.parametrize("status", ["running", "finished", "interrupted", "diverged", "failed"])
def test_status_is_plain_to_see(make_facts, status):
    page = Page(render_report(make_facts(status=status, reason="" if status == "finished" else "Because of this."), []))
    banners = [attrs for _, attrs in page.tags if "banner" in (attrs.get("class") or "").split()]
    assert len(banners) == (status != "finished")
    assert ("Because of this." in page.text) == (status != "finished")


def test_every_text_is_escaped(make_history):
    facts = RunFacts(
        task=EVIL,
        base=EVIL,
        revision=EVIL,
        status="failed",
        reason=EVIL,
        recipe={EVIL: {"text": EVIL, "list": [EVIL]}},
        environment={EVIL: EVIL},
        started=EVIL,
        data=[DataFacts(EVIL, EVIL, 1, {EVIL: EVIL, "more": [EVIL, {EVIL: EVIL}]})],
        adapted=[AdaptedGroup(EVIL, EVIL, 1, [1], 1, 1.0, EVIL, 1, EVIL)],
        skipped=[SkippedGroup(EVIL, EVIL, 1, EVIL)],
        trained=[EVIL],
        notes=[EVIL],
        memory_planned={EVIL: 10},
        memory_measured={EVIL: 10, "peak": 3},
        before={EVIL: 1.0},
        after={EVIL: 2.0},
        throughput={EVIL: 1.0},
        samples=[Sample(EVIL, [(EVIL, EVIL)], [(EVIL, EVIL)])],
        tables=[Table(EVIL, [EVIL], [[EVIL]])],
    )
    history = [*make_history(), *({"step": step, "eval_" + EVIL: 1.0} for step in (1, 2))]
    page = Page(render_report(facts, history))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "embed", "base", "form"})
    assert [attrs["src"] for tag, attrs in page.tags if tag == "img"] == [f"data:image/png;base64,{EVIL}"]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert page.text.count(EVIL) >= 25


def test_sample_text_is_shown_as_it_is(make_facts):
    code = "def f():\n\treturn '<b>'  # €\n\n\n    x"
    page = Page(render_report(make_facts(samples=[Sample("s", [("prompt", code)])]), []))
    assert code in page.text


def test_half_a_character_can_be_written(make_facts, tmp_path):
    facts = make_facts(samples=[Sample("s", [("prompt", "a\ud83db\0c")])], recipe={"text": "\ud83d"})
    path = tmp_path / "report.html"
    path.write_text(render_report(facts, []), encoding="utf-8")
    assert "a?b" in Page(path.read_text(encoding="utf-8")).text


def test_nothing_is_fetched(make_facts, make_history):
    html = render_report(make_facts(), make_history())
    page = Page(html)
    addresses = [
        attrs[name]
        for _, attrs in page.tags
        for name in ("src", "href", "xlink:href", "srcset", "poster", "action", "data", "background")
        if name in attrs
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert set(re.findall(r"url\(([^)]{1,2})", html)) == {"#p"}
    assert "@import" not in html
    assert "://" not in html
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_same_input_same_page(make_facts, make_history):
    first = render_report(make_facts(), make_history())
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path", "axes.grid": True}):
        assert render_report(make_facts(), make_history()) == first
        assert matplotlib.rcParams["font.size"] == 30


def test_facts_that_were_written_and_read_give_the_same_page(make_facts, make_history, tmp_path):
    facts = make_facts()
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(facts.as_dict()))
    assert render_report(RunFacts.read(path), make_history()) == render_report(facts, make_history())


def test_ids_are_unique_and_every_reference_is_met(make_facts, make_history):
    html = render_report(make_facts(), make_history())
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert ids
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', html)) <= set(ids)


def test_colours_come_from_the_page(make_facts, make_history):
    html = render_report(make_facts(), make_history())
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 6
    for drawing in drawings:
        assert not re.search(r"(stroke|fill): #", drawing)
        assert "var(--line-1)" in drawing
        assert "<text" in drawing
        assert "font-family" not in drawing
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    for block in re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL):
        assert used <= set(re.findall(r"(--[\w-]+):", block))
    assert len(re.findall(r":root \{", html)) == 3


def test_every_chart_says_what_it_shows(make_facts, make_history):
    page = Page(render_report(make_facts(), make_history()))
    labels = [attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(labels) == 6
    assert re.match(r"Loss by step: training from 2\.\d+ to 0\.\d+, between .*; evaluation from", labels[0])


def test_charts_of_a_whole_run(make_history):
    made = charts(make_history(), resumed_from=[500])
    assert [chart.title for chart in made] == ["Loss", "Learning rate", "Gradient norm", "Adapter norm", "RougeL"]
    loss = made[0]
    assert [name for name, _ in loss.drawings] == ["wide", "small"]
    assert loss.legend == [(1, "training"), (2, "evaluation")]
    assert loss.remarks == ["Resumed at step 500 (dotted)."]
    for _, drawing in loss.drawings:
        [training], [evaluation] = lines(drawing, 1), lines(drawing, 2)
        assert training.count("L") > 100
        assert evaluation.count("L") == 9
        assert marks(drawing, 2) == 10


@pytest.mark.parametrize(
    "history",
    [[], [{}], [{"step": 1}], [{"loss": 1.0}], [{"step": 1, "loss": None, "grad_norm": "much", "learning_rate": True}]],
    ids=["empty", "no keys", "no values", "no step", "no numbers"],
)
def test_no_points(make_facts, history):
    page = Page(render_report(make_facts(), history))
    assert "No point was logged." in page.text
    assert "svg" not in {tag for tag, _ in page.tags}


def test_a_single_point_is_seen():
    [chart] = charts([{"step": 7, "loss": 2.5}])
    assert all(marks(drawing) == 1 for _, drawing in chart.drawings)
    assert chart.label == "Loss by step: training 2.5."
    steps = re.findall(r">(\d+)</text>", chart.drawings[0][1])
    assert len(steps) == len(set(steps))


def test_a_gap_where_values_are_not_finite():
    values = [1.0, 2.0, math.nan, 3.0, "inf", "nan", 4.0, 5.0, None, 6.0] * 5
    [chart] = charts([{"step": i, "loss": value} for i, value in enumerate(values)])
    assert chart.remarks == ["15 training points were not finite, the first at step 2 (crosses)."]
    [line] = lines(chart.drawings[0][1])
    # (1 2) _ (3) _ _ (4 5 6 1 2) _ (3) ...: what is None was not logged and leaves no gap.
    assert line.count("M") == 11
    assert marks(chart.drawings[0][1]) == 5
    assert len(re.findall(r"<use [^>]*stroke: var\(--bad\)", chart.drawings[0][1])) == 15


def test_nothing_finite(make_facts):
    history = [{"step": step, "loss": math.nan} for step in range(3)]
    [chart] = charts(history)
    assert chart.drawings == []
    text = Page(render_report(make_facts(), history)).text
    assert "3 training points were not finite" in text
    assert "No finite value to draw." in text


def test_enormous_values_can_be_drawn():
    for values in ([1e308, -1e308, 1.0], [10**400, 2.0, 1.0], [-1e38, 1e38], [1e-300, 1e38], [0.0, 0.0], [5, 5, 5]):
        [chart] = charts([{"step": i, "loss": value} for i, value in enumerate(values)])
        numbers = re.findall(r"[-\d.e+]+", " ".join(lines(chart.drawings[0][1])))
        assert all(math.isfinite(float(n)) for n in numbers)
        assert "nan" not in chart.drawings[0][1]


def test_a_long_climb_gets_a_logarithmic_axis():
    [chart] = charts([{"step": i, "grad_norm": 10.0**i} for i in range(6)])
    assert "Logarithmic axis." in chart.remarks
    assert ">100,000</text>" in chart.drawings[0][1]


def test_rows_in_any_order_give_the_same_curve(make_history):
    assert charts(make_history()) == charts(list(reversed(make_history())))


def test_metrics_that_were_evaluated_once_have_no_curve():
    once = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0, "eval_accuracy": 0.5, "eval_runtime": 1.0}]
    assert [chart.title for chart in charts(once)] == ["Loss"]
    twice = [*once, {"step": 3, "eval_accuracy": 0.6, "eval_runtime": 1.0}]
    assert [chart.title for chart in charts(twice)] == ["Loss", "Accuracy"]


def test_changes(make_facts):
    facts = make_facts(
        before={"loss": 2.0, "accuracy": 0.5, "zero": 0.0, "gone": 1.0, "broken": "nan"},
        after={"loss": "nan", "accuracy": 0.25, "zero": -1.0, "new": 3, "broken": 1.0},
        higher_is_better=["accuracy"],
    )
    assert [(row.name, row.before, row.after, row.change, row.relative, row.verdict) for row in changes(facts)] == [
        ("loss", "2", "not finite", "", "", "worse"),
        ("accuracy", "0.5", "0.25", "-0.25", "(-50.0 %)", "worse"),
        ("zero", "0", "-1", "-1", "", "better"),
        ("gone", "1", "-", "", "", ""),
        ("broken", "not finite", "1", "", "", ""),
        ("new", "-", "3", "", "", ""),
    ]


def test_memory_parts_follow_each_other(make_facts):
    bars = {bar.name: bar for bar in memory_bars(make_facts())}
    assert list(bars) == [
        "Weights",
        "Adapter",
        "Activations",
        "Planned in all",
        "Measured peak",
        "of it before training",
    ]
    assert bars["Adapter"].start == pytest.approx(bars["Weights"].width, abs=0.02)
    assert bars["Activations"].start + bars["Activations"].width == pytest.approx(
        bars["Planned in all"].width, abs=0.02
    )
    assert bars["Measured peak"].width == 100
    assert memory_bars(make_facts(memory_planned={}, memory_measured={})) == []
    assert all(bar.width == 0 for bar in memory_bars(make_facts(memory_planned={"total": 0}, memory_measured={})))


def test_a_run_of_which_nothing_is_known_yet():
    facts = RunFacts("seq2seq", "base")
    assert key_numbers(facts) == [("Steps", "0", ""), ("Epochs", "0", ""), ("Training time", "-", "")]
    assert "This run has not finished." in Page(render_report(facts, [])).text


def test_readable_numbers():
    assert [
        number(n) for n in (1234567, 1234.5, 0.00002, 0.123456, 12.3456, 1e30, math.inf, "inf", True, None, "x")
    ] == [
        "1,234,567",
        "1,234",
        "2e-05",
        "0.1235",
        "12.35",
        "1e+30",
        "not finite",
        "not finite",
        "yes",
        "-",
        "x",
    ]
    assert [duration(s) for s in (0.04, 12.3, 59.7, 60, 61, 3599.9, 4331, 90000, math.nan)] == [
        "0.0 s",
        "12 s",
        "1 min",
        "1 min",
        "1 min 1 s",
        "1 h",
        "1 h 12 min",
        "1 d 1 h",
        "-",
    ]
    assert [share(1, 0), share(1, 3), share(1, 1000), share(1, 10**6)] == ["-", "33.3 %", "0.10 %", "0.0001 %"]


def test_a_shaded_table_colours_numbers_by_their_share_of_the_row(make_facts):
    rows = [["cat", 9, 1, 0], ["dog", 0, 0, 0], ["<b>", 1, "nan", 3]]
    plain = Table("Plain", ["", "cat", "dog", "<b>"], rows)
    shaded = Table("Confusion", ["", "cat", "dog", "<b>"], rows, shaded=True)

    def shares(table):
        cells = [attrs for tag, attrs in Page(render_report(make_facts(tables=[table]), [])).tags if tag == "td"]
        return [attrs["style"] for attrs in cells if "--share" in attrs.get("style", "")]

    assert shares(plain) == []
    assert shares(shaded) == [f"--share: {share}%" for share in (90, 10, 25, 75)]


def test_facts_of_before_shading_are_read(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"task": "t", "base": "b", "tables": [{"title": "T", "header": ["a"], "rows": [[1]]}]}))
    assert RunFacts.read(path).tables == [Table("T", ["a"], [[1]], shaded=False)]
