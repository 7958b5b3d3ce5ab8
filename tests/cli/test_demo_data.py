"""The demo's data: split by file, balanced, the same every time; and the demo's own small measurements."""

import ast
import hashlib
import math
import textwrap
from collections import Counter

import pytest
import torch
from helpers import llama
from torch import nn

from lora_adapters.cli import demo_data
from lora_adapters.cli.demo_data import (
    LABELS,
    docstring_paragraphs,
    function_sources,
    language_data,
    section_data,
    section_passages,
    side_of,
    word_runs,
)
from lora_adapters.errors import MissingDependencyError, UnsupportedError

# ---- which section of a reference page ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sections():
    return section_data(train_per_class=30, test_per_class=15)


def test_every_class_has_as_many_passages(sections):
    assert sections.labels == LABELS
    assert Counter(e.label for e in sections.train) == dict.fromkeys(range(len(LABELS)), 30)
    assert Counter(e.label for e in sections.test) == dict.fromkeys(range(len(LABELS)), 15)
    for part in (sections.train, sections.test):
        assert max(Counter((e.file, e.label) for e in part).values()) <= 8


def test_no_file_and_no_run_of_words_is_on_both_sides(sections):
    files = [{e.file for e in part} for part in (sections.train, sections.test)]
    assert not files[0] & files[1]
    assert {side_of(file) for file in files[0]} == {"train"}
    assert {side_of(file) for file in files[1]} == {"test"}
    assert {file.split("/")[0] for file in files[0] | files[1]} == set(demo_data.NUMPYDOC_PACKAGES)
    runs = [set().union(*(word_runs(e.text, 6) for e in part)) for part in (sections.train, sections.test)]
    assert not runs[0] & runs[1]


def test_passages_are_distinct_short_prose(sections):
    texts = [e.text for e in (*sections.train, *sections.test)]
    assert len(set(texts)) == len(texts)
    assert all(5 <= len(text.split()) <= 24 for text in texts)
    assert not any(mark in text for text in texts for mark in (">>>", "\n", "`", "::"))


def test_it_is_the_same_every_time(sections):
    assert section_data(train_per_class=30, test_per_class=15) == sections
    # More passages of each class extend what fewer gave: no random choice hides in it.
    fewer = section_data(train_per_class=10, test_per_class=1)
    assert set(fewer.train) <= set(sections.train)


def write_package(root, name, files):
    for path, source in files.items():
        target = root / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source, encoding="utf-8")
    (root / name / "__init__.py").write_text("", encoding="utf-8")


def page(number):
    """A module with one documented function, whose words say which module and which section they come from.

    In letters: passages that differ in digits alone count as copies.
    """
    module = chr(ord("a") + number)

    def words(heading):
        return " ".join(f"{heading.replace(' ', '')}{module}{chr(ord('a') + i)}" for i in range(10))

    parts = [words("Summary")]
    for heading in LABELS[1:]:
        entry = {"Notes": words(heading), "References": f".. [1] {words(heading)}"}
        body = entry.get(heading, f"name :\n    {words(heading)}")
        parts.append(f"{heading}\n{'-' * len(heading)}\n{body}")
    docstring = textwrap.indent("\n\n".join(parts), "    ")
    return f'def f():\n    """\n{docstring}\n    """\n'


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package of documented modules, make it importable, and the demo's only source."""

    def write(files):
        write_package(tmp_path, "documented", files)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(demo_data, "NUMPYDOC_PACKAGES", ("documented",))
        return {side: [f for f in files if side_of(f"documented/{f}") == side] for side in ("train", "test")}

    return write


def test_every_section_is_found_in_its_file(package):
    sides = package({f"m{i}.py": page(i) for i in range(12)})
    data = section_data(len(sides["train"]), len(sides["test"]))
    for part, side in ((data.train, "train"), (data.test, "test")):
        assert {e.file for e in part} == {f"documented/{f}" for f in sides[side]}
        for e in part:
            number = int(e.file.removeprefix("documented/m").removesuffix(".py"))
            assert f"{LABELS[e.label].replace(' ', '')}{chr(ord('a') + number)}b" in e.text


def test_text_that_was_copied_between_files_is_held_out_of_the_test(package):
    sides = package({f"m{i}.py": page(i) for i in range(12)})
    package({sides["test"][0]: page(int(sides["train"][0][1:-3]))})
    fewer = section_data(len(sides["train"]), len(sides["test"]) - 1)
    assert f"documented/{sides['test'][0]}" not in {e.file for e in fewer.test}
    with pytest.raises(UnsupportedError, match=f"fewer than {len(sides['test'])} test passages of class Summary, "):
        section_data(len(sides["train"]), len(sides["test"]))


def test_tests_and_unreadable_files_are_passed_over(package):
    files = {f"m{i}.py": page(i) for i in range(12)}
    sides = package({**files, "tests/m20.py": page(20), "_lib/m21.py": page(21), "broken.py": "def f(:\n"})
    data = section_data(len(sides["train"]) - 2, 1)
    assert {e.file for e in (*data.train, *data.test)} <= {f"documented/{f}" for f in files}


def test_too_little_text_is_said(package):
    package({"m0.py": page(0)})
    with pytest.raises(
        UnsupportedError, match=r"documented hold fewer than 2 train passages of class .*fewer per class"
    ):
        section_data(2, 1)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(demo_data, "NUMPYDOC_PACKAGES", ("no_such_package_here",))
    with pytest.raises(MissingDependencyError, match=r"no_such_package_here.*pip install 'lora-adapters\[demo\]'"):
        section_data(1, 1)


def test_a_docstring_is_cut_into_its_sections():
    docstring = textwrap.dedent(
        """
        Compute `something` of :class:`~pkg.Thing`, quickly, with care [1]_.

        This second paragraph is no summary and so it is left out of it.

        Parameters
        ----------
        alpha : float
            How strong the first of the two effects is meant to be.
        n : int

        Attributes
        ----------
        ignored : a heading that is none of the classes

        Returns
        -------
        ignored : its entries read like those of the parameters

        See Also
        --------
        out : the array of results, one for each row

        more : an entry of many words that holds a directive

            .. versionadded:: 1.0

        Notes
        -----
        >>> this is a doctest and not at all prose

        The second example has one more word than that.

        References
        ----------
        .. [1] A. Author, a title of a paper, in a journal.
        """
    ).strip()
    passages = [
        ("Summary", "Compute something of pkg.Thing, quickly, with care."),
        ("Parameters", "alpha : float How strong the first of"),
        ("See Also", "out : the array of results, one for"),
        ("Notes", "The second example has one more word than"),
        ("References", "A. Author, a title of a paper, in"),
    ]
    # Which of these sections are classes is the task's choice.
    assert list(section_passages(docstring, 8)) == [passage for passage in passages if passage[0] in LABELS]


# ---- English and Python ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language():
    return language_data(train_characters=30_000, new_characters=10_000, test_characters=5_000)


def test_sizes_and_sides_of_the_language_data(language):
    for corpus, train in ((language.prose, 30_000), (language.code, 10_000)):
        assert 0.8 * train < sum(map(len, corpus.train)) <= train
        assert 0.5 * 5_000 < sum(map(len, corpus.test)) <= 5_000
        assert len({*corpus.train, *corpus.test}) == len(corpus.train) + len(corpus.test)
        runs = [set().union(*(word_runs(text, 12) for text in part)) for part in (corpus.train, corpus.test)]
        assert not runs[0] & runs[1]


def test_prose_is_prose_and_code_is_code(language):
    assert all(len(text.split()) >= 8 and ">>>" not in text for text in language.prose.train)
    for text in language.code.train:
        (function,) = ast.parse(text).body
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))


def test_the_language_data_is_the_same_every_time(language):
    assert language_data(30_000, 10_000, 5_000) == language


def test_a_python_without_sources_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UnsupportedError, match="without the sources"):
        language_data(1000, 1000, 1000)


SOURCE = '''
"""The module's own docstring has more than eight words and is not taken."""


class Thing:
    """A thing that has a docstring of more than eight words.

    Too short.

    >>> an example of more than eight words which is no prose
    A second
      paragraph, broken over two lines, of more than eight words.

    The last of its paragraphs says nothing of any use at all.
    """

    async def wait(self):
        """Only a docstring."""

    def value(self, x: int = 1) -> int:
        """Too short."""
        # a comment
        def inner():
            return "not a docstring"
        return x + inner()  # another
'''


def test_paragraphs_of_docstrings():
    assert list(docstring_paragraphs(SOURCE)) == [
        "A thing that has a docstring of more than eight words.",
        "The last of its paragraphs says nothing of any use at all.",
    ]
    assert list(docstring_paragraphs("x = 1")) == []


def test_sources_of_functions():
    inner = "def inner():\n    return 'not a docstring'"
    assert sorted(function_sources(SOURCE)) == sorted(
        [
            "async def wait(self):\n    pass",
            f"def value(self, x: int=1) -> int:\n\n{textwrap.indent(inner, '    ')}\n    return x + inner()",
            inner,
        ]
    )
    assert list(function_sources("x = 1")) == []


def test_runs_of_words():
    assert word_runs("One, two: THREE four", 3) == {("one", "two", "three"), ("two", "three", "four")}
    assert word_runs("too short", 3) == {("too", "short")}


def test_the_side_of_a_file_depends_on_its_path_alone():
    names = [f"package/module_{i}.py" for i in range(2000)]
    by_hand = {
        n: "test" if int.from_bytes(hashlib.sha256(n.encode()).digest()[:8], "big") % 10 < 3 else "train" for n in names
    }
    assert {n: side_of(n) for n in names} == by_hand
    assert 0.27 < list(by_hand.values()).count("test") / len(names) < 0.33


# ---- what the demo measures -----------------------------------------------------------------------------------------


class Bigram(nn.Module):
    """Logits (batch, length, words) that depend on the last word alone."""

    def __init__(self, logits):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(logits)

    def forward(self, input_ids):
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.table(input_ids))


def test_perplexity_of_known_probabilities():
    from lora_adapters.cli.demo_language import perplexity

    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2]])
    model = Bigram(probabilities.log())
    # 0 -> 0 (0.5), 0 -> 1 (0.25), 1 -> 2 (0.8); 2 -> 1 (0.6), 1 -> 0 (0.1), 0 -> 2 (0.25)
    blocks = [torch.tensor([0, 0, 1, 2]), torch.tensor([2, 1, 0, 2])]
    expected = math.exp(-sum(map(math.log, (0.5, 0.25, 0.8, 0.6, 0.1, 0.25))) / 6)
    assert perplexity(model, blocks) == pytest.approx(expected, rel=1e-5)
    assert perplexity(Bigram(torch.zeros(7, 7)), blocks) == pytest.approx(7, rel=1e-5)


def test_perplexity_is_that_of_transformers_own_loss():
    from lora_adapters.cli.demo_language import perplexity

    model = llama(attention_dropout=0.5)
    blocks = list(torch.randint(3, 30, (19, 12), generator=torch.Generator().manual_seed(0)))  # more than one batch
    found = perplexity(model.train(), blocks)
    with torch.no_grad():
        ids = torch.stack(blocks)
        loss = model.eval()(input_ids=ids, labels=ids).loss
    assert found == pytest.approx(math.exp(loss.item()), rel=1e-5)


def test_sizes_of_an_nf4_base():
    from lora_adapters.cli.demo_classification import base_sizes
    from lora_adapters.weights import Nf4, quantize_modules

    model = nn.ModuleDict({"words": nn.Embedding(10, 64), "up": nn.Linear(64, 256), "norm": nn.LayerNorm(256)})
    quantize_modules(model, {"up": Nf4()}, torch.float32)
    blocks = 64 * 256 // 64
    # Packed values; each block's maximum in a byte; one fp32 for 256 maxima, their mean, and the two code tables.
    packed = 64 * 256 // 2 + blocks + 4 * (blocks // 256) + 4 + 4 * 16 + 4 * 256
    dense = 10 * 64 + 256 + 2 * 256
    assert base_sizes(model) == {
        "values": 64 * 256 + dense,
        "fp32_bytes": 4 * (64 * 256 + dense),
        "nf4_bytes": packed + 4 * dense,
        "linear_fp32_bytes": 4 * 64 * 256,
        "linear_nf4_bytes": packed,
    }


def test_text_is_cut_into_blocks_of_tokens():
    from lora_adapters.cli.demo_language import _blocks

    corpus = demo_data.TextCorpus(train=("abc", "de"), test=("f",))
    train, test = _blocks(corpus, lambda text: [*map(ord, text), 0], context=3)
    assert [block.tolist() for block in train] == [[*b"abc"], [0, *b"de"]]
    assert test == []
