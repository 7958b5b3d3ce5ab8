"""Module-name patterns from adapter files, matched in bounded time.

PEFT's `rank_pattern` and `alpha_pattern` keys are regular expressions, and a file can hold one that keeps `re` busy for
hours. This matcher takes the part of the syntax that names of modules need (characters, classes, `.`, `* + ?` on one
character, groups with alternatives, `^` and `$` at the ends) and simulates it state by state: no backtracking, so the
time is at most (pattern length) x (name length). Anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Generic, TypeVar

from .errors import CheckpointError

Value = TypeVar("Value")

MAX_LENGTH = 2**16
MAX_ALTERNATIVES = 4096
#: Steps of one look_up. One step is one atom tried against one character, or one known transition.
MAX_STEPS = 1_500_000
#: Characters of one alternative, of all alternatives of a run, and of all patterns of one PatternMap.
MAX_ATOMS, MAX_TOTAL_ATOMS, MAX_TOTAL_LENGTH = 512, 100_000, 200_000

_ESCAPE = r"\\(?:[dDwWsS]|[^A-Za-z0-9])"
_ATOM = re.compile(rf"{_ESCAPE}|\[\^?(?:{_ESCAPE}|[^\]\[\\&|~])+\]|[^\\()|\[\]*+?{{}}^$]")
_QUANTIFIER = re.compile(r"([*+?])\??")

#: One character's pattern, and whether it may be left out or repeated.
Atom = tuple["re.Pattern[str]", bool, bool]


class _Parser:
    """Turns a pattern into its alternatives, each a flat list of atoms."""

    def __init__(self, text: str):
        self.text, self.position = text, 0

    def fail(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"The pattern {self.text[:80]!r} {why}, so it can't be matched in bounded time. Write module names or a "
            "simple pattern (characters, classes, '.*', alternatives) into adapter_config.json instead."
        )

    def at(self, characters: str) -> bool:
        return self.position < len(self.text) and self.text[self.position] in characters

    def alternatives(self, depth: int = 0) -> list[list[Atom]]:
        if depth > 10:
            raise self.fail("nests groups too deeply")
        done: list[list[Atom]] = []
        current: list[list[Atom]] = [[]]
        while self.position < len(self.text) and not self.at(")"):
            if self.at("|"):
                self.position += 1
                done, current = done + current, [[]]
            else:
                tails = self.group(depth) if self.at("(") else [self.atoms()]
                current = [head + tail for head in current for tail in tails]
            longest = max(map(len, current))
            if longest > MAX_ATOMS or longest * len(current) > MAX_TOTAL_ATOMS:
                raise self.fail("is too long")
            if len(done) + len(current) > MAX_ALTERNATIVES:
                raise self.fail("has too many alternatives")
        return done + current

    def group(self, depth: int) -> list[list[Atom]]:
        self.position += 1
        if self.text.startswith("?:", self.position):
            self.position += 2
        inner = self.alternatives(depth + 1)
        if not self.at(")"):
            raise self.fail("has an unclosed group")
        self.position += 1
        if self.at("*+?{"):
            raise self.fail("repeats a group")
        return inner

    def atoms(self) -> list[Atom]:
        found = _ATOM.match(self.text, self.position)
        if not found or "--" in found.group():
            raise self.fail(f"uses syntax that is not supported at character {self.position}")
        self.position = found.end()
        try:
            one = re.compile(found.group())
        except re.error as error:
            raise self.fail(f"is no regular expression ({error})") from None
        quantifier = _QUANTIFIER.match(self.text, self.position)
        if not quantifier:
            return [(one, False, False)]
        self.position = quantifier.end()
        if self.at("*+?{"):
            raise self.fail("repeats a repetition")
        star = {"*": (one, True, True), "+": (one, True, True), "?": (one, True, False)}[quantifier.group(1)]
        return [(one, False, False), star] if quantifier.group(1) == "+" else [star]


class _Machine:
    """One alternative. A set of states is an int: bit i says that atoms 0..i-1 have been matched."""

    def __init__(self, atoms: list[Atom]):
        self.atoms = atoms
        self.closure = [1 << len(atoms)] * (len(atoms) + 1)
        for index in range(len(atoms) - 1, -1, -1):
            self.closure[index] = (1 << index) | (self.closure[index + 1] if atoms[index][1] else 0)
        self.known: dict[tuple[int, str], int] = {}
        self.steps = 0
        # Without repetition there is nothing to backtrack over, so `re` itself is linear, and much faster.
        fixed = not any(optional for _, optional, _ in atoms)
        self.fixed = re.compile("".join(one.pattern for one, _, _ in atoms)) if fixed else None

    def step(self, states: int, character: str) -> int:
        self.steps += 1
        key = (states, character)
        if key not in self.known:
            result = 0
            for index, (one, _, repeats) in enumerate(self.atoms):
                if states >> index & 1 and one.fullmatch(character):
                    result |= self.closure[index] if repeats else self.closure[index + 1]
            self.steps += len(self.atoms)
            if self.steps > MAX_STEPS:
                raise _too_long("A pattern")
            self.known[key] = result
        return self.known[key]

    def matches(self, name: str, starts: Collection[int]) -> bool:
        """Return True if all of `name` after one of `starts` matches."""
        states = 0
        for position, character in enumerate(name):
            if position in starts:
                states |= self.closure[0]
            states = self.step(states, character)
        if len(name) in starts:
            states |= self.closure[0]
        return bool(states >> len(self.atoms) & 1)


class NamePattern:
    """One checked pattern: its alternatives, and whether it must match from a name's beginning.

    Raises:
        CheckpointError: the pattern needs more than the supported syntax.
    """

    def __init__(self, pattern: str):
        if len(pattern) > MAX_LENGTH:
            raise CheckpointError(f"A module pattern of {len(pattern)} characters is too long (at most {MAX_LENGTH}).")
        self.anchored = pattern.startswith("^")
        body = pattern[1:] if self.anchored else pattern
        if body.endswith("$") and not body.endswith("\\$"):
            body = body[:-1]
        parser = _Parser(body)
        self.machines = [_Machine(atoms) for atoms in parser.alternatives()]
        if parser.position < len(body):
            raise parser.fail("closes a group that is not open")
        if pattern != body and "|" in body and len(self.machines) > 1 and _top_level_bar(body):
            raise parser.fail("anchors only one of its alternatives")


def _too_long(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} on this many modules would take too long to match. Use fewer, plainer entries in target_modules, "
        "rank_pattern and alpha_pattern of adapter_config.json."
    )


def _top_level_bar(body: str) -> bool:
    depth = 0
    for character in re.sub(rf"{_ESCAPE}|\[[^\]]*\]", "", body):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "|" and depth == 0:
            return True
    return False


class PatternMap(Generic[Value]):
    """Patterns with a value each, such as PEFT's `rank_pattern`: the first that matches a module's name decides.

    Args:
        patterns: pattern -> value.
        suffix: True matches all of a name after any of its dots too (rank_pattern's rule in PEFT); False only all of
            it (the rule of a target_modules string).

    Raises:
        CheckpointError: a pattern needs more than the supported syntax, or they are too long together.
    """

    def __init__(self, patterns: Mapping[str, Value], suffix: bool = True):
        if sum(map(len, patterns)) > MAX_TOTAL_LENGTH:
            raise _too_long(f"{len(patterns)} patterns of this length")
        self.values = list(patterns.values())
        self.suffix = suffix
        # A pattern without repetition matches names of one length: most names need not be tried against it.
        self.fixed: dict[int, list[tuple[int, bool, re.Pattern[str]]]] = {}
        self.flexible: list[tuple[int, bool, _Machine]] = []
        for order, text in enumerate(patterns):
            pattern = NamePattern(text)
            for machine in pattern.machines:
                if machine.fixed:
                    entries = self.fixed.setdefault(len(machine.atoms), [])
                    entries.append((order, pattern.anchored, machine.fixed))
                else:
                    self.flexible.append((order, pattern.anchored, machine))

    def look_up(self, names: Iterable[str], default: Value) -> dict[str, Value]:
        """Value of every name.

        Raises:
            CheckpointError: it would take too long.
        """
        result: dict[str, Value] = {}
        self.steps = 0
        for name in names:
            first = self._first(name)
            result[name] = default if first is None else self.values[first]
        return result

    def _first(self, name: str) -> int | None:
        starts = {0}
        if self.suffix:
            starts.update(index + 1 for index, character in enumerate(name) if character == ".")
        found: int | None = None
        for start in starts:
            for order, anchored, pattern in self.fixed.get(len(name) - start, ()):
                self._spend(1)
                if (found is None or order < found) and not (anchored and start) and pattern.fullmatch(name, start):
                    found = order
        for order, anchored, machine in self.flexible:
            if found is not None and order > found:
                break
            before = machine.steps
            matches = machine.matches(name, {0} if anchored else starts)
            self._spend(1 + machine.steps - before)
            if matches:
                return order
        return found

    def _spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise _too_long(f"{len(self.values)} patterns")
