"""Names written with underscores for dots, and back: exact, since only names of known structures are read.

"down_blocks_0_resnets_1_conv1" could be cut into a dotted name in many ways. A structure is therefore a set of templates
such as "down_blocks.#.resnets.#.conv1", where # is any number, and a flat name is the one template that it matches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"[0-9]+")


class NameTable:
    """The dotted names of one structure.

    Args:
        templates: dotted names, # for a number. Other digits mean themselves.
    """

    def __init__(self, templates: Iterable[str]):
        self._by_shape: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
        for template in dict.fromkeys(templates):
            flat = template.replace(".", "_")
            pattern = re.compile(re.escape(flat).replace(re.escape("#"), "(0|[1-9][0-9]{0,5})"))
            self._by_shape.setdefault(_NUMBER.sub("#", flat), []).append((template, pattern))

    def dotted(self, flat: str) -> str | None:
        """Return the dotted name that `flat` means, None if it is none of this structure."""
        if (found := self.match(flat)) is None:
            return None
        template, numbers = found
        return fill(template, numbers)

    def match(self, flat: str) -> tuple[str, tuple[str, ...]] | None:
        """Return the template that `flat` matches, and its numbers."""
        for template, pattern in self._by_shape.get(_NUMBER.sub("#", flat), ()):
            if found := pattern.fullmatch(flat):
                return template, found.groups()
        return None

    def __contains__(self, dotted: str) -> bool:
        return self.dotted(dotted.replace(".", "_")) == dotted


def fill(template: str, numbers: Iterable[str]) -> str:
    """Return a template with its #s replaced by `numbers`, in order."""
    for number in numbers:
        template = template.replace("#", number, 1)
    return template


def flat(dotted: str) -> str:
    """Return a dotted name with underscores."""
    return dotted.replace(".", "_")
