"""Parts of messages that every backend words alike."""

from __future__ import annotations

from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, the name of the error's class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a sentence for the end of a message, " Did you mean 'rank'?", or nothing where no known name is like it.

    Args:
        name: what was given.
        known: what there is.
        cutoff: likeness (0 to 1) that is enough; see `difflib.get_close_matches`.
    """
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
