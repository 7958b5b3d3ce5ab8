"""Reading rows: every kind of file, what is said of a broken one, and that nothing stale is served."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_adapters_transformers.data.tables import read_data, read_table
from lora_adapters_transformers.recipes import TextData

from lora_adapters.errors import RequestError

ROWS = [
    {"text": "plain", "label": "a", "n": 1},
    {"text": 'with "quotes", commas;\nand a second line', "label": "NA", "n": 2},
    {"text": "ünïcödé 🙂 \u2028 \x85 end", "label": "null", "n": 3},
    {"text": "2020-01-01", "label": "", "n": 4},
]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, text, encoding="utf-8"):
    data = text.encode(encoding) if isinstance(text, str) else text
    with gzip.open(name, "wb") if name.endswith(".gz") else open(name, "wb") as file:
        file.write(data)


def as_csv(rows, delimiter=","):
    import csv
    import io

    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize(
    "name, text",
    [
        ("d.jsonl", lines(ROWS)),
        ("raw.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)),
        ("bom.jsonl", "\ufeff" + lines(ROWS)),
        ("windows.jsonl", lines(ROWS).replace("\n", "\r\n")),
        ("blank.jsonl", "\n" + lines(ROWS).replace("\n", "\n\n")),
        ("list.json", json.dumps(ROWS, indent=2)),
        ("lines.json", lines(ROWS)),
    ],
)
def test_json(name, text, zipped):
    write(name + zipped, text)
    assert list(read_table(name + zipped)) == ROWS


@pytest.mark.parametrize("name, delimiter", [("d.csv", ","), ("d.tsv", "\t"), ("semi.csv", ";"), ("d.csv.gz", ",")])
def test_csv_keeps_every_text_as_it_is(name, delimiter):
    write(name, as_csv(ROWS, delimiter))
    assert list(read_table(name)) == [{**row, "n": str(row["n"])} for row in ROWS]


@pytest.mark.parametrize("zipped", [False, True])
def test_parquet(zipped):
    datasets.Dataset.from_list(ROWS).to_parquet("d.parquet")
    if zipped:
        write("d.parquet.gz", Path("d.parquet").read_bytes())
    assert read_table("d.parquet.gz" if zipped else "d.parquet").to_list() == ROWS


def test_parquet_keeps_class_labels():
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"label": [0, 1]}, features=features).to_parquet("d.parquet")
    assert read_table("d.parquet").features["label"].names == ["no", "yes"]


def test_plain_text_is_a_row_for_each_line_that_is_not_blank():
    write("d.txt", "one\r\n\n  two \u2028 still two\n\t\nthree")
    assert read_table("d.txt")["text"] == ["one", "  two \u2028 still two", "three"]


def test_nested_values_come_back_with_their_own_keys_only():
    rows = [
        {"messages": [{"role": "user", "content": "hi"}], "meta": {"a": 1}},
        {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"x": 1.5, "y": None}}]}], "meta": {"b": []}},
    ]
    write("d.jsonl", lines(rows))
    assert list(read_table("d.jsonl")) == rows


def test_columns_of_mixed_kinds_become_text_and_missing_ones_none():
    rows = [{"x": 1}, {"x": "two"}, {"x": True}, {"x": 2.5, "late": "here"}, {"x": None, "big": 2**80}]
    write("d.jsonl", lines(rows))
    found = read_table("d.jsonl")
    assert found["x"] == ["1", "two", "true", "2.5", None]
    assert found["late"] == [None, None, None, "here", None]
    assert found["big"][4] == str(2**80)


def test_kinds_that_change_after_many_rows():
    rows = [{"x": i, "y": "t"} for i in range(10_001)] + [{"x": "z", "y": ["l"], "new": 1}]
    write("d.jsonl", lines(rows))
    found = read_table("d.jsonl")
    assert found[0] == {"x": "0", "y": "t", "new": None}
    assert found[10_001] == {"x": "z", "y": ["l"], "new": 1}


values = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(st.characters(codec="utf-8"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.lists(values) | st.text()), min_size=1).filter(any))
def test_any_rows_of_texts_and_lists(rows):
    """Columns of one kind come back exactly; where texts and lists share a column, both do."""
    write("any.jsonl", lines(rows))
    names = {name for row in rows for name in row}
    assert list(read_table("any.jsonl")) == [{name: row.get(name) for name in names} for row in rows]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("d.jsonl", '{"a": 1}\n{"a": 2}\n{"a": 3,}\n', r"d\.jsonl, line 3 is no JSON: .*\(column \d+\)"),
        ("d.jsonl", '{"a": 1}\n\n{"a": 3\n', "line 3 is no JSON"),
        ("d.jsonl", '{"a": 1}\n"text"\n', "line 2 is a text, not an object"),
        ("d.jsonl", '{"a": 1}\n[1]\n', "line 2 is a list, not an object"),
        ("d.json", '{\n "a": 1\n}\n', "line 1 is no JSON: .* each line must be a whole object"),
        ("d.json", '[{"a": 1},\n {"a": }]', "line 2 is no JSON"),
        ("d.json", '[{"a": 1}, 7]', "record 2 is a number, not an object"),
        ("d.jsonl", "[" * 100_000, "nested too deep"),
        ("d.jsonl", b'{"a": "x"}\n{"a": "\xff"}\n', "no UTF-8 text .byte 0xff"),
        ("d.jsonl", lines(ROWS).encode("utf-16"), "no UTF-8"),
        ("d.jsonl", '{"a": "\\ud83d"}\n', "half of a .u surrogate pair"),
        ("d.csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 fields, the header 2"),
        ("d.csv", "a,b\n1\n", "line 2 has 1 fields"),
        ("d.csv", 'a,b\n"1"x,2\n', "line 2 is no CSV"),
        ("d.csv", 'a,b\n"open,2\n', "no CSV: unexpected end"),
        ("d.csv", "a,a\n1,2\n", "two columns named 'a'"),
        ("d.parquet", "no parquet", "no readable Parquet"),
        ("d.jsonl", "", "has no rows"),
        ("d.json", "[]", "has no rows"),
        ("d.csv", "", "has no rows"),
        ("d.csv", "a,b\n", "has no rows"),
        ("d.txt", " \n\n", "has no rows"),
        ("d.xml", "<a/>", "of no kind that can be read: .jsonl"),
    ],
)
def test_a_broken_file_is_described_in_one_line(name, text, message):
    write(name, text)
    with pytest.raises(RequestError, match=message) as caught:
        read_table(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [5, 30])
def test_a_broken_gz_file(cut):
    write("d.jsonl.gz", lines(ROWS * 50))
    whole = Path("d.jsonl.gz").read_bytes()
    Path("d.jsonl.gz").write_bytes(whole[:cut])
    with pytest.raises(RequestError, match=r"d\.jsonl\.gz is a broken \.gz file"):
        read_table("d.jsonl.gz")
    Path("d.jsonl.gz").write_bytes(b"not zipped")
    with pytest.raises(RequestError, match=r"d\.jsonl\.gz is a broken \.gz file"):
        read_table("d.jsonl.gz")


@pytest.mark.parametrize(
    "name, message",
    [
        ("dta.jsonl", "data.train: no file or folder 'dta.jsonl'; did you mean 'data.jsonl'"),
        ("sub/dta.jsonl", r"did you mean 'sub.data\.jsonl'"),
        ("sbu/data.jsonl", "did you mean 'sub'"),
        ("./nothing-like-it", "relative to the working directory"),
        ("data.jsnl", "did you mean the file 'data.jsonl'"),
        ("no/such-dataset", "no Hub dataset that can be loaded"),
    ],
)
def test_a_missing_file_names_the_nearest(name, message):
    os.mkdir("sub")
    write("data.jsonl", lines(ROWS))
    write("sub/data.jsonl", lines(ROWS))
    with pytest.raises(RequestError, match=message) as caught:
        read_table(name, key="data.train")
    assert "\n" not in str(caught.value)


def test_folders_and_lists():
    os.makedirs("d/sub/.hidden")
    for i, name in enumerate(["d/b.jsonl", "d/a.json", "d/sub/c.jsonl.gz"]):
        write(name, lines([{"text": name, "i": i}]))
    write("d/README.md", "no data")
    write("d/sub/.hidden/x.csv", "a\n1\n")
    assert read_table("d")["text"] == ["d/a.json", "d/b.jsonl", "d/sub/c.jsonl.gz"]
    assert read_table(["d/b.jsonl", "d/a.json", "d/b.jsonl"])["i"] == [0, 1, 0]
    write("e.csv", "text,i\nx,7\n")
    assert read_table(["d/b.jsonl", "e.csv"])["i"] == ["0", "7"]
    write("d/sub/other.csv", "a\n1\n")
    with pytest.raises(RequestError, match=r"several kinds .*json.* and .*other\.csv"):
        read_table("d")
    os.mkdir("empty")
    with pytest.raises(RequestError, match="folder empty has no file of a kind"):
        read_table("empty")
    with pytest.raises(RequestError, match="the list is empty"):
        read_table([])


def test_saved_datasets():
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk("one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk("two")
    assert list(read_table("one")) == ROWS
    assert list(read_table("two")) == ROWS
    assert read_table("two", split="test").to_list() == [ROWS[1]]
    with pytest.raises(RequestError, match="no split 'dev'; it has train, test"):
        read_table("two", split="dev")


def test_subset_and_split_are_not_for_files():
    write("d.jsonl", lines(ROWS))
    with pytest.raises(RequestError, match=r"d\.jsonl is a file, which has no subset"):
        read_table("d.jsonl", subset="x")
    with pytest.raises(RequestError, match="which has no eval_split"):
        read_data(TextData(train="d.jsonl", eval_split="test"), 0)


def test_a_changed_file_gives_its_new_rows():
    """Same name, size and time of change: anything that caches by these would give the old rows."""
    write("d.jsonl", lines([{"text": "old"}]))
    then = os.stat("d.jsonl")
    assert read_table("d.jsonl")["text"] == ["old"]
    write("d.jsonl", lines([{"text": "new"}]))
    os.utime("d.jsonl", ns=(then.st_atime_ns, then.st_mtime_ns))
    assert os.stat("d.jsonl").st_size == then.st_size
    assert read_table("d.jsonl")["text"] == ["new"]


def test_nothing_is_printed_nor_written(capfd, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    write("d.jsonl", lines(ROWS * 100))
    read_data(TextData(train="d.jsonl", eval_fraction=0.1, limit=50), 0)
    read_table(["d.jsonl", "d.jsonl"])
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert sorted(os.listdir(tmp_path)) == ["d.jsonl"]


def numbered(count, name="d.jsonl"):
    write(name, lines([{"text": str(i)} for i in range(count)]))


def test_dividing_is_seeded_and_loses_nothing():
    numbered(50)
    data = TextData(train="d.jsonl", eval_fraction=0.2)
    train, held_out = read_data(data, 3)
    assert len(held_out) == 10
    assert sorted([*train["text"], *held_out["text"]], key=int) == [str(i) for i in range(50)]
    assert list(map(int, train["text"])) == sorted(map(int, train["text"]))
    again = read_data(data, 3)
    assert [part["text"][:] for part in again] == [train["text"][:], held_out["text"][:]]
    assert read_data(data, 4)[1]["text"][:] != held_out["text"][:]


def test_limits():
    numbered(50)
    numbered(20, "e.jsonl")
    train, held_out = read_data(TextData(train="d.jsonl", eval="e.jsonl", limit=7, eval_limit=100), 0)
    assert (len(train), len(held_out)) == (7, 20)
    assert set(train["text"]) != {str(i) for i in range(7)}, "rows at random: files are often sorted"
    train, held_out = read_data(TextData(train="d.jsonl", eval_fraction=0.5, limit=10, eval_limit=2), 0)
    assert (len(train), len(held_out)) == (5, 2)
    assert read_data(TextData(train="d.jsonl", limit=60), 0)[1] is None


def test_a_fraction_gives_each_side_a_row():
    numbered(2)
    assert [len(part) for part in read_data(TextData(train="d.jsonl", eval_fraction=0.01), 0)] == [1, 1]
    with pytest.raises(RequestError, match=r"eval_fraction: 0\.9 of 2 rows leaves none to train on"):
        read_data(TextData(train="d.jsonl", eval_fraction=0.9), 0)
    numbered(1)
    with pytest.raises(RequestError, match="of 1 row leaves none"):
        read_data(TextData(train="d.jsonl", eval_fraction=0.1), 0)
