"""Which modules a request means: role expressions, names, regular expressions, layer subsets, per-target ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from .errors import NoTargetError, RequestError, UnsupportedError
from .projection_parts import in_parts
from .request import AttachRequest, check_pattern
from .targets import GROUPS, Classification, Part, expand

_NONE: Mapping[str, str] = {}


@dataclass(frozen=True)
class Choice:
    """What was chosen for one module.

    Attributes:
        role: its own role; a fused projection keeps it where only parts are adapted.
        rank, alpha: of its adapter.
        named: True if the user named it and did not just name a role.
        parts: the parts of a fused projection to adapt, whose ranks make up `rank`; empty for all of it.
    """

    role: str
    rank: int
    alpha: float
    named: bool = False
    parts: tuple[Part, ...] = ()


#: A module's name, and the role of the part of it that is meant: "" for all of it.
Hit = tuple[str, str]


def select(
    request: AttachRequest, names: Iterable[str], classes: Classification, other_names: Mapping[str, str] = _NONE
) -> dict[str, Choice]:
    """Return module name -> Choice, in the model's order.

    Args:
        request: what the user asked for.
        names: names of all modules that could carry an adapter, in the model's order.
        classes: their roles.
        other_names: further name -> first name, of modules that are registered more than once.

    Raises:
        NoTargetError: a word, name or pattern matches nothing.
        UnsupportedError: a role expression on a model whose roles nobody could check.
    """
    names = list(names)
    if request.exact is not None:
        return {
            name: Choice(
                classes.roles.get(name, "other"), *request.exact[name], True, tuple(request.exact_parts.get(name, ()))
            )
            for name in names
            if name in request.exact
        }
    matcher = _Matcher(names, classes, other_names)
    default = Choice("", request.rank, request.rank if request.alpha is None else request.alpha)
    chosen = _Chosen(request, classes)
    for key, rank, alpha in _entries(request, classes):
        choice = default
        if rank is not None:
            # A rank of its own keeps the request's scale: alpha follows the rank unless alpha was given.
            choice = replace(default, rank=rank, alpha=rank if request.alpha is None else request.alpha)
        if alpha is not None:
            choice = replace(choice, alpha=alpha)
        if request.peft_targets:
            matched, named = matcher.peft(key)
        else:
            matched, named = matcher.match(str(key), names_first=isinstance(request.targets, tuple))
        for name, part in matched:
            chosen.add(name, part, replace(choice, role=classes.roles.get(name, "other"), named=named))
    chosen.apply_peft_patterns()
    chosen.drop_excluded(matcher)
    kept = _keep_layers(request, chosen.layers())
    return {name: kept[name] for name in names if name in kept}


def _entries(request: AttachRequest, classes: Classification) -> list[tuple[object, int | None, float | None]]:
    targets = request.targets
    if request.peft_targets and not isinstance(targets, Mapping):
        return [(targets, None, None)]
    if isinstance(targets, str):
        return [(classes.default if targets == "auto" else targets, None, None)]
    if isinstance(targets, Mapping):
        return [
            (key, value.get("rank"), value.get("alpha")) if isinstance(value, Mapping) else (key, value, None)
            for key, value in targets.items()
        ]
    return [(key, None, None) for key in targets]


class _Matcher:
    def __init__(self, names: list[str], classes: Classification, other_names: Mapping[str, str]) -> None:
        self.names, self.classes = names, classes
        # Whichever of its names a user knows a module by, it is the one module.
        known = set(names)
        self.spellings = {name: name for name in names} | {o: n for o, n in other_names.items() if n in known}
        self.by_role: dict[str, list[str]] = {}
        for name in names:
            self.by_role.setdefault(classes.roles.get(name, "other"), []).append(name)
        self.by_part: dict[str, list[str]] = {}
        for name in names:
            for role in classes.parts.get(name, ()):
                self.by_part.setdefault(role, []).append(name)

    def match(self, key: str, names_first: bool) -> tuple[list[Hit], bool]:
        """Return the modules a key of `targets` means, and whether it names modules rather than roles.

        In a list a word is a module's name before it is a role ("q" in T5 is both); elsewhere a role comes first.
        """
        if key.startswith("re:"):
            return _whole(self._required(key, self._find(check_pattern(key[3:]).search))), True
        words = [word.strip() for word in key.split("+")]
        named = self._find(lambda name: name == key or name.endswith("." + key))
        roles = all(expand(word) for word in words)
        known = roles and all(self._hits(word) for word in words)
        if named and (names_first or not known):
            return _whole(named), True
        if roles:
            return self._trusted(key, self._roles(key, words)), False
        raise NoTargetError(self._nothing(key, words))

    def _trusted(self, key: str, found: list[Hit]) -> list[Hit]:
        """Return `found`, which roles chose, unless the roles of this model are a guess."""
        if self.classes.unverified and found:
            ends = sorted({name.rpartition(".")[2] for name, _ in found})
            raise UnsupportedError(
                f"{self.classes.unverified} So {key!r} is not taken on trust: name the modules, as names or as "
                f"targets='re:...'. Going by their names alone it would be targets={ends}."
            )
        return found

    def _hits(self, word: str) -> list[Hit]:
        """Return what a word stands for: modules of these roles, and parts that have the role where they are fused."""
        whole = [name for role in expand(word) or () for name in self.by_role.get(role, ())]
        return _whole(whole) + [(name, word) for name in self.by_part.get(word, ())]

    def _roles(self, key: str, words: list[str]) -> list[Hit]:
        found: list[Hit] = []
        for word in words:
            hits = self._hits(word)
            if not hits:
                raise NoTargetError(self._no_role(word))
            found += hits
        whole = {name for name, part in found if not part}
        if twice := next((hit for hit in found if hit[1] and hit[0] in whole), None):
            raise RequestError(_asked_twice(*twice, f"{key!r} asks"))
        return found

    def _no_role(self, word: str) -> str:
        have = ", ".join(f"{role} ({len(names)})" for role, names in self.by_role.items())
        fused = next((f for f in ("qkv", "kv") if word in f and f in self.by_role), None)
        if fused:
            example = self.by_role[fused][0]
            return f"This model has no separate {word!r}: {example!r} holds {fused} in one layer. Ask for {fused!r}."
        return f"This model has no module with role {word!r}. It has: {have or 'none'}."

    def _nothing(self, key: str, words: list[str]) -> str:
        suffixes = sorted({name.rpartition(".")[2] for name in self.names})
        known = [*GROUPS, *self.by_role]
        bad = next((word for word in words if not expand(word)), key)
        near = get_close_matches(bad, [*known, *suffixes], n=3, cutoff=0.5)
        hint = f" Nearest: {', '.join(map(repr, near))}." if near else ""
        return (
            f"targets {key!r} match no layer.{hint} Roles of this model: {', '.join(known)}. "
            f"Layer names end in: {', '.join(suffixes[:20])}{' ...' if len(suffixes) > 20 else ''}."
        )

    def _find(self, test: Callable[[str], object]) -> list[str]:
        return list(dict.fromkeys(name for spelling, name in self.spellings.items() if test(spelling)))

    def _required(self, key: str, found: list[str]) -> list[str]:
        if not found:
            raise NoTargetError(self._nothing(key, [key]))
        return found

    def peft(self, key: object) -> tuple[list[Hit], bool]:
        """Return the modules PEFT's target_modules means: a full match of a string, suffixes of a list.

        As in PEFT a module that is registered more than once counts under its first name.
        """
        if isinstance(key, str):
            if key == "all-linear":
                roles = (*GROUPS["all-linear"], "router")
                found = [n for n in self.names if self.classes.roles.get(n, "other") in roles]
                return self._trusted(key, _whole(found)), False
            test = check_pattern(key).fullmatch
            return _whole(self._required(key, [name for name in self.names if test(name)])), True
        keys: list[str] = list(key)  # type: ignore[call-overload]
        found: list[str] = []
        for one in keys:
            found += self._required(one, [n for n in self.names if n == one or n.endswith("." + one)])
        return _whole(found), True

    def excluded(self, key: str) -> list[Hit]:
        if key.startswith("re:"):
            return _whole(self._find(check_pattern(key[3:]).search))
        found = self._trusted(key, self._hits(key))
        return found or _whole(self._find(lambda n: n == key or n.endswith("." + key) or n.startswith(key + ".")))


def _whole(names: Iterable[str]) -> list[Hit]:
    return [(name, "") for name in names]


def _asked_twice(name: str, part: str, who: str) -> str:
    return (
        f"{who} for all of {name!r} and for its {part!r} alone, which is one layer: ask for the parts by name (q, k, v), "
        "each with its rank, or for the whole layer."
    )


class _Chosen:
    """What the entries of a request chose so far. Later entries override earlier ones."""

    def __init__(self, request: AttachRequest, classes: Classification) -> None:
        self.request, self.rows = request, classes.parts
        # Module -> role of a part -> its choice; "" stands for the whole module.
        self.asked: dict[str, dict[str, Choice]] = {}

    def add(self, name: str, part: str, choice: Choice) -> None:
        if not part:
            self.asked[name] = {"": choice}
            return
        mine = self.asked.setdefault(name, {})
        if "" in mine:
            raise RequestError(_asked_twice(name, part, "targets ask"))
        mine[part] = choice

    def apply_peft_patterns(self) -> None:
        """Apply PEFT's rank_pattern and alpha_pattern: each key must match the end of a module's name."""
        for field, value_name in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
            for key, value in (self.request.peft_fields.get(field) or {}).items():
                pattern = check_pattern(rf"(.*\.)?({key.removeprefix('^')})$")
                matched = [name for name in self.asked if pattern.match(name)]
                if not matched:
                    raise NoTargetError(f"{field} key {key!r} matches none of the {len(self.asked)} chosen layers.")
                for name in matched:
                    if "" not in self.asked[name]:
                        raise RequestError(
                            f"{field} key {key!r} matches {name!r}, which is adapted in parts: give the parts their "
                            f"ranks by targets={{'q': ..., 'v': ...}} instead."
                        )
                    self.asked[name][""] = replace(self.asked[name][""], **{value_name: value})

    def drop_excluded(self, matcher: _Matcher) -> None:
        for key in self.request.exclude:
            excluded = matcher.excluded(key)
            if not excluded:
                raise NoTargetError(f"exclude {key!r} matches no layer of this model.")
            for name, part in excluded:
                mine = self.asked.get(name, {})
                if part and "" in mine:
                    others = "+".join(role for role in self.rows[name] if role != part)
                    raise RequestError(
                        f"exclude {key!r} means a part of {name!r}, which is adapted whole: ask for the other parts "
                        f"instead, {others!r}."
                    )
                mine.pop(part, None) if part else mine.clear()
                if not mine:
                    self.asked.pop(name, None)
        if not self.asked:
            raise NoTargetError("exclude leaves no layer to adapt.")

    def layers(self) -> dict[str, Choice]:
        """Return module -> its one choice."""
        return {name: mine[""] if "" in mine else self._in_parts(name, mine) for name, mine in self.asked.items()}

    def _in_parts(self, name: str, mine: Mapping[str, Choice]) -> Choice:
        wanted = {role: (choice.rank, choice.alpha) for role, choice in mine.items()}
        parts, alpha = in_parts(name, wanted, self.rows[name], self.request)
        return replace(next(iter(mine.values())), rank=sum(part.rank for part in parts), alpha=alpha, parts=parts)


def layer_index(name: str, pattern: str | None = None) -> int | None:
    """Return the index of the repeated block a module is in: the first number in its dotted name, else None."""
    match = re.search(rf"(?:^|\.){pattern}\.(\d+)\." if pattern else r"(?:^|\.)(\d+)\.", name + ".")
    return int(match.group(1)) if match else None


def _keep_layers(request: AttachRequest, chosen: dict[str, Choice]) -> dict[str, Choice]:
    if request.layers is None:
        return chosen
    patterns = request.peft_fields.get("layers_pattern")
    pattern = "|".join(f"(?:{p})" for p in ([patterns] if isinstance(patterns, str) else patterns or ()))
    index = {name: layer_index(name, f"(?:{pattern})" if pattern else None) for name in chosen}
    blocks = sorted({i for i in index.values() if i is not None})
    if not blocks:
        raise NoTargetError("layers was given, but no chosen layer is inside a numbered block.")
    count = blocks[-1] + 1
    wanted = {i + count if i < 0 else i for i in request.layers}
    if missing := sorted(wanted - set(blocks)):
        raise RequestError(f"layers {missing} hold no chosen layer; there are blocks {blocks[0]} to {blocks[-1]}.")
    return {name: choice for name, choice in chosen.items() if index[name] in wanted}
