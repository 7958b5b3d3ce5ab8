"""What names mean to stock PEFT: the shortest keys that mean exactly a set of modules, and what modules_to_save means."""

from __future__ import annotations

import re
from collections.abc import Iterable


def target_modules_for(names: Iterable[str], universe: Iterable[str]) -> list[str] | str:
    """Return what to write as target_modules so that PEFT matches `names` and nothing else of `universe`.

    A list of last name parts where those are enough (PEFT matches the end of a name), which every tool understands;
    else one regular expression, which PEFT matches in full.
    """
    wanted = set(names)
    by_suffix: dict[str, set[str]] = {}
    for name in universe:
        by_suffix.setdefault(name.rpartition(".")[2], set()).add(name)
    suffixes = {name.rpartition(".")[2] for name in wanted}
    if all(by_suffix[suffix] <= wanted for suffix in suffixes):
        return sorted(suffixes)
    return "|".join(_alternatives(wanted))


def exact_targets(names: Iterable[str]) -> list[str] | str:
    """Return what to write as target_modules for `names`, whatever other modules the model has.

    Whole names, unless one has no dot: PEFT would also match it at the end of longer ones ("proj_out" in
    "blocks.0.proj_out"), so that one regular expression says it.
    """
    wanted = set(names)
    return sorted(wanted) if all("." in name for name in wanted) else "|".join(_alternatives(wanted))


def patterns_for(names: Iterable[str], universe: Iterable[str]) -> list[str]:
    """Return keys for PEFT's rank_pattern or alpha_pattern that match `names` and nothing else of `universe`."""
    targets = target_modules_for(names, universe)
    return targets if isinstance(targets, list) else [f"^{one}" for one in _alternatives(set(names))]


def saved_whole(keys: Iterable[str], name: str) -> bool:
    """Return True if `name`, or a module it lies in, is what modules_to_save `keys` mean to PEFT.

    PEFT compares the ends of names as text: "norm" means "input_layernorm" too.
    """
    parts = name.split(".")
    ends = tuple(keys)
    return any(".".join(parts[:count]).endswith(ends) for count in range(1, len(parts) + 1))


def _alternatives(names: set[str]) -> list[str]:
    """Return regular expressions that together match exactly `names`; names that differ in one number share one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.search(r"(?:^|(?<=\.))\d+(?=\.|$)", name)
        if match:
            groups.setdefault((name[: match.start()], name[match.end() :]), []).append(match.group())
        else:
            groups.setdefault((name, ""), [])
    found = []
    for (before, after), numbers in sorted(groups.items()):
        middle = f"({'|'.join(sorted(numbers, key=int))})" if len(numbers) > 1 else "".join(numbers)
        found.append(re.escape(before) + middle + re.escape(after))
    return found
