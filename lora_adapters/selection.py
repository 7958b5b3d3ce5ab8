"""Which modules a request means: role expressions, names, regular expressions, layer subsets, per-target ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from .errors import NoTargetError, RequestError, UnsupportedError
from .request import AttachRequest, check_pattern
from .targets import GROUPS, Classification, expand

_NONE: Mapping[str, str] = {}


@dataclass(frozen=True)
class Choice:
    """What was chosen for one module. `named` is True if the user named it and did not just name a role."""

    role: str
    rank: int
    alpha: float
    named: bool = False


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
            name: Choice(classes.roles.get(name, "other"), *request.exact[name], named=True)
            for name in names
            if name in request.exact
        }
    matcher = _Matcher(names, classes, other_names)
    default = Choice("", request.rank, request.rank if request.alpha is None else request.alpha)
    chosen: dict[str, Choice] = {}
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
        for name in matched:
            chosen[name] = replace(choice, role=classes.roles.get(name, "other"), named=named)
    chosen = _apply_peft_patterns(request, chosen)
    chosen = _drop_excluded(request, matcher, chosen)
    chosen = _keep_layers(request, chosen)
    return {name: chosen[name] for name in names if name in chosen}


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

    def match(self, key: str, names_first: bool) -> tuple[list[str], bool]:
        """Return the modules a key of `targets` means, and whether it names modules rather than roles.

        In a list a word is a module's name before it is a role ("q" in T5 is both); elsewhere a role comes first.
        """
        if key.startswith("re:"):
            return self._required(key, self._find(check_pattern(key[3:]).search)), True
        words = [word.strip() for word in key.split("+")]
        named = self._find(lambda name: name == key or name.endswith("." + key))
        roles = all(expand(word) for word in words)
        known = roles and all(any(role in self.by_role for role in expand(word) or ()) for word in words)
        if named and (names_first or not known):
            return named, True
        if roles:
            return self._trusted(key, self._roles(words)), False
        raise NoTargetError(self._nothing(key, words))

    def _trusted(self, key: str, found: list[str]) -> list[str]:
        """Return `found`, which roles chose, unless the roles of this model are a guess."""
        if self.classes.unverified and found:
            ends = sorted({name.rpartition(".")[2] for name in found})
            raise UnsupportedError(
                f"{self.classes.unverified} So {key!r} is not taken on trust: name the modules, as names or as "
                f"targets='re:...'. Going by their names alone it would be targets={ends}."
            )
        return found

    def _roles(self, words: list[str]) -> list[str]:
        found: list[str] = []
        for word in words:
            modules = [name for role in expand(word) or () for name in self.by_role.get(role, ())]
            if not modules:
                raise NoTargetError(self._no_role(word))
            found += modules
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

    def peft(self, key: object) -> tuple[list[str], bool]:
        """Return the modules PEFT's target_modules means: a full match of a string, suffixes of a list.

        As in PEFT a module that is registered more than once counts under its first name.
        """
        if isinstance(key, str):
            if key == "all-linear":
                roles = (*GROUPS["all-linear"], "router")
                found = [n for n in self.names if self.classes.roles.get(n, "other") in roles]
                return self._trusted(key, found), False
            test = check_pattern(key).fullmatch
            return self._required(key, [name for name in self.names if test(name)]), True
        keys: list[str] = list(key)  # type: ignore[call-overload]
        found: list[str] = []
        for one in keys:
            found += self._required(one, [n for n in self.names if n == one or n.endswith("." + one)])
        return found, True

    def excluded(self, key: str) -> list[str]:
        if key.startswith("re:"):
            return self._find(check_pattern(key[3:]).search)
        found = self._trusted(key, [name for role in expand(key) or () for name in self.by_role.get(role, ())])
        return found or self._find(lambda n: n == key or n.endswith("." + key) or n.startswith(key + "."))


def _apply_peft_patterns(request: AttachRequest, chosen: dict[str, Choice]) -> dict[str, Choice]:
    """Apply PEFT's rank_pattern and alpha_pattern: each key must match the end of a module's name."""
    for field, value_name in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        for key, value in (request.peft_fields.get(field) or {}).items():
            pattern = check_pattern(rf"(.*\.)?({key.removeprefix('^')})$")
            matched = [name for name in chosen if pattern.match(name)]
            if not matched:
                raise NoTargetError(f"{field} key {key!r} matches none of the {len(chosen)} chosen layers.")
            for name in matched:
                chosen[name] = replace(chosen[name], **{value_name: value})
    return chosen


def _drop_excluded(request: AttachRequest, matcher: _Matcher, chosen: dict[str, Choice]) -> dict[str, Choice]:
    for key in request.exclude:
        excluded = matcher.excluded(key)
        if not excluded:
            raise NoTargetError(f"exclude {key!r} matches no layer of this model.")
        for name in excluded:
            chosen.pop(name, None)
    if not chosen:
        raise NoTargetError("exclude leaves no layer to adapt.")
    return chosen


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
