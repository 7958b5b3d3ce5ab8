"""Arguments that several commands read alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import RequestError

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (paths, overrides): "a.b=value" is an override unless there is such a path.

    Raises:
        RequestError: no path is among them.
    """
    overrides = [a for a in arguments if _OVERRIDE.match(a) and not Path(a).exists()]
    paths = [a for a in arguments if a not in overrides]
    if not paths:
        raise RequestError("Name an adapter: a run's folder, an adapter's, or a name on the Hub.")
    return paths, overrides
