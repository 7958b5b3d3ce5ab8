"""Data of the demo, built from the sources of installed packages: nothing is downloaded, no package is imported.

Both data sets are split by file: all text of one source file is on one side. Which side depends on a hash of the file's
path alone, so that another version of a package changes examples but not the rule. Packages copy text between files,
so a held-out text that shares a run of words with a training text is left out.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import MissingDependencyError, UnsupportedError

#: Packages whose docstrings follow the numpydoc standard, which names the sections of a reference page.
NUMPYDOC_PACKAGES = ("numpy", "scipy", "sklearn")
#: Section headings -> class. "Summary" is the text before the first heading. Left out: Returns, whose entries read
#: like parameters, and Examples, whose prose reads like notes.
SECTIONS = {
    "Parameters": "Parameters",
    "Notes": "Notes",
    "See Also": "See Also",
    "See also": "See Also",
    "References": "References",
}
LABELS = ("Summary", "Parameters", "Notes", "See Also", "References")
#: Sections that are lists of entries: an unindented line and the indented lines under it.
_LISTS = frozenset({"Parameters", "See Also", "References"})
_HEADING = re.compile(r"^([A-Z][\w ]+)\n-{3,}[ \t]*$", re.MULTILINE)
_NO_PROSE = (">>>", "math:", "---", "===", "::")
#: Folders of tests, of vendored code, and of modules that some Linux distributions leave out of Python.
_SKIPPED = frozenset(
    [
        "tests",
        "test",
        "externals",
        "_lib",
        "_build_utils",
        "site-packages",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "tkinter",
        "turtledemo",
        "pydoc_data",
        "encodings",
        "distutils",
        "ensurepip",
        "__phello__",
    ]
)


@dataclass(frozen=True)
class TextExample:
    """One passage, the index of its class in `ClassificationData.labels`, and the source file it comes from."""

    text: str
    label: int
    file: str


@dataclass(frozen=True)
class ClassificationData:
    """A balanced text classification task with a held-out part."""

    labels: tuple[str, ...]
    train: tuple[TextExample, ...]
    test: tuple[TextExample, ...]


@dataclass(frozen=True)
class TextCorpus:
    """Passages of one kind of text, with a held-out part."""

    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class LanguageModelData:
    """The text a language model is pretrained on, and the text it is then adapted to."""

    prose: TextCorpus
    code: TextCorpus


def section_data(train_per_class: int, test_per_class: int, max_words: int = 24) -> ClassificationData:
    """Which section of a reference page does this passage come from?

    Source: the docstrings of numpy, scipy and scikit-learn. A passage is the first `max_words` words of a summary, of
    a list entry (a parameter, a reference, ...) or of a paragraph of notes; doctests, tables
    and formulas are left out. Passages shorter than 5 words are dropped, copies too. At most 8 passages of one class
    come from one file, so that no long file stands for its class.

    Split: by file. A held-out passage that shares 6 words in a row with a training passage is dropped.

    Args:
        train_per_class: training passages of each class.
        test_per_class: held-out passages of each class.
        max_words: words kept of a passage.

    Raises:
        MissingDependencyError: a package is not installed.
        UnsupportedError: the installed packages hold too little text.
    """
    files = [(name, path) for package in NUMPYDOC_PACKAGES for name, path in _package_files(package)]
    train = _collect_sections(files, "train", train_per_class, max_words, set())
    seen = {run for example in train for run in word_runs(example.text, 6)}
    test = _collect_sections(files, "test", test_per_class, max_words, seen)
    return ClassificationData(LABELS, tuple(train), tuple(test))


def language_data(train_characters: int, new_characters: int, test_characters: int) -> LanguageModelData:
    """English and Python: the docstrings of Python's standard library, and its code without them.

    Source: the standard library of the running Python. Prose is each paragraph of a docstring of 8 words or more
    without doctests; code is each function as `ast.unparse` writes it, without docstrings and comments.

    Split: by file, the same files for both kinds. A held-out passage that shares 12 words in a row with a training
    passage of its kind is dropped.

    Args:
        train_characters: characters of prose to pretrain on, at most.
        new_characters: characters of code to adapt to, at most.
        test_characters: held-out characters of each kind, at most.

    Raises:
        UnsupportedError: this Python comes without the sources of its library.
    """
    files = list(_python_files(Path(sysconfig.get_path("stdlib"))))
    prose = _collect_corpus(files, docstring_paragraphs, train_characters, test_characters)
    code = _collect_corpus(files, function_sources, new_characters, test_characters)
    return LanguageModelData(prose, code)


def side_of(file: str) -> str:
    """Return "test" for about three files in ten and "train" for the others, by a hash of the file's path."""
    return "test" if _hash(file) % 10 < 3 else "train"


def word_runs(text: str, length: int) -> set[tuple[str, ...]]:
    """Return every run of `length` words of a text in lower case; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + length]) for start in range(max(1, len(words) - length + 1))}


def section_passages(docstring: str, max_words: int) -> Iterator[tuple[str, str]]:
    """Yield (class, passage) of a docstring that follows the numpydoc standard."""
    parts = _HEADING.split(docstring)
    for heading, body in zip([None, *parts[1::2]], parts[0::2], strict=True):
        label = "Summary" if heading is None else SECTIONS.get(heading)
        if label is None:
            continue
        blocks = _entries(label, body) if label in _LISTS else re.split(r"\n\s*\n", body.strip())
        for block in blocks[:1] if label == "Summary" else blocks:
            words = _plain(block).split()[:max_words]
            if len(words) >= 5 and not any(mark in block for mark in _NO_PROSE):
                yield label, " ".join(words)


def docstring_paragraphs(source: str) -> Iterator[str]:
    """Yield the paragraphs of prose of every docstring in a Python source."""
    for docstring in _docstrings(source):
        for paragraph in re.split(r"\n\s*\n", docstring):
            if len(paragraph.split()) >= 8 and ">>>" not in paragraph:
                yield " ".join(paragraph.split())


def function_sources(source: str) -> Iterator[str]:
    """Yield the code of every function and method in a Python source, without docstrings and comments."""
    tree = _parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            yield ast.unparse(node)


def _collect_sections(
    files: Sequence[tuple[str, Path]], side: str, per_class: int, max_words: int, banned: set[tuple[str, ...]]
) -> list[TextExample]:
    """Read files of one side, in the order of their hashes, until every class is full."""
    found: list[TextExample] = []
    counts: Counter[str] = Counter()
    texts: set[str] = set()
    for name, path in _of_side(files, side):
        if all(counts[label] == per_class for label in LABELS):
            break
        here: Counter[str] = Counter()
        for docstring in _docstrings(_read(path)):
            for label, text in section_passages(docstring, max_words):
                key = re.sub(r"[\W\d_]+", " ", text.lower())
                if counts[label] == per_class or here[label] == 8 or key in texts or banned & word_runs(text, 6):
                    continue
                texts.add(key)
                counts[label] += 1
                here[label] += 1
                found.append(TextExample(text, LABELS.index(label), name))
    if short := [label for label in LABELS if counts[label] < per_class]:
        raise UnsupportedError(
            f"The installed {', '.join(NUMPYDOC_PACKAGES)} hold fewer than {per_class} {side} passages of class "
            f"{', '.join(short)}: ask for fewer per class."
        )
    return found


def _collect_corpus(files: Sequence[tuple[str, Path]], passages, train_size: int, test_size: int) -> TextCorpus:
    train = _take(files, passages, "train", train_size, set())
    banned = {run for text in train for run in word_runs(text, 12)}
    test = _take(files, passages, "test", test_size, banned)
    if not train or not test:
        raise UnsupportedError(
            "This Python comes without the sources of its standard library, which the demo learns from. "
            "Use a Python whose library folder holds .py files."
        )
    return TextCorpus(tuple(train), tuple(test))


def _take(files: Sequence[tuple[str, Path]], passages, side: str, size: int, banned: set[tuple[str, ...]]) -> list[str]:
    """Return distinct passages of one side, in the order of their files' hashes, of `size` characters at most."""
    taken: dict[str, None] = {}
    for _, path in _of_side(files, side):
        for text in passages(_read(path)):
            if text in taken or banned & word_runs(text, 12):
                continue
            size -= len(text)
            if size < 0:
                return list(taken)
            taken[text] = None
    return list(taken)


def _of_side(files: Sequence[tuple[str, Path]], side: str) -> list[tuple[str, Path]]:
    """Return the files of one side in the order of their hashes, which mixes packages and folders."""
    return sorted((file for file in files if side_of(file[0]) == side), key=lambda file: _hash(file[0]))


def _package_files(package: str) -> Iterator[tuple[str, Path]]:
    """Yield (path from the package's parent, file) of an installed package's sources."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            f"The demo reads the docstrings of {package}, which is not installed. "
            "Install it with: pip install 'lora-adapters[demo]'."
        )
    for name, path in _python_files(Path(spec.submodule_search_locations[0])):
        yield f"{package}/{name}", path


def _python_files(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED.isdisjoint(relative.parts):
            yield relative.as_posix(), path


def _entries(label: str, body: str) -> list[str]:
    """Split a section that is a list into its entries. References begin with ".. [1]", which is left out."""
    blocks: list[list[str]] = []
    for line in body.strip("\n").split("\n"):
        if line and not line[0].isspace() and (label != "References" or line.startswith("..")):
            blocks.append([re.sub(r"^\.\. \[\w+\]", "", line)])
        elif blocks:
            blocks[-1].append(line)
    return ["\n".join(block) for block in blocks]


def _plain(text: str) -> str:
    """Strip reStructuredText markup and everything from the first directive (such as `.. versionadded::`) on."""
    text = re.split(r"^\s*\.\. ", text, maxsplit=1, flags=re.MULTILINE)[0]
    text = re.sub(r":\w+:`~?\.?([^`<]+)(?:<[^>]*>)?`", r"\1", text)
    return re.sub(r"\s*\[\w+\]_|[`*]", "", text)


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(_parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and (
            text := ast.get_docstring(node)
        ):
            yield text


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        return ast.parse(source)


def _read(path: Path) -> str:
    """Return a source file's text, or "" for one that is no UTF-8 or no Python of this version."""
    try:
        text = path.read_text(encoding="utf-8")
        _parse(text)
    except (SyntaxError, ValueError, OSError):
        return ""
    return text


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
