"""Takes out of facts what nobody should paste: tokens, folders, addresses, the user's and the machine's name.

The facts are made without them. But an error's text is somebody else's, and may quote anything.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH", re.IGNORECASE)
_SECRET = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)\w{6,}")
#: An address keeps its host, and not who logs in there or what is asked for; a path keeps its last part:
#: "~/mine/secret/x.py" and "C:\\mine\\x.py" are ".../x.py". One expression, since an address holds what looks like a path.
_PLACE = re.compile(
    r"\b(?P<scheme>\w+)://(?:[^\s/@]*@)?(?P<host>[^\s/?#'\"]*)[^\s'\")\]]*"
    r"|(?<=['\"])(?:~|[A-Za-z]:)?[/\\](?:[^'\"\n]*[/\\])(?P<quoted>[^'\"\n]*)"
    r"|(?<![\w./\\])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\":,;]+[/\\]+)+(?P<last>[^\s/\\'\":,;]*)"
)


def paste_ready(facts: Any) -> Any:
    """Return the facts with every string in them cleaned; keys of dicts stay."""
    return _cleaned(facts, _words())


def _cleaned(facts: Any, words: list[tuple[re.Pattern[str], str]]) -> Any:
    if isinstance(facts, dict):
        return {key: _cleaned(value, words) for key, value in facts.items()}
    if isinstance(facts, (list, tuple)):
        return [_cleaned(value, words) for value in facts]
    if not isinstance(facts, str):
        return facts
    for word, instead in words:
        facts = word.sub(instead, facts)
    return _PLACE.sub(_place, _SECRET.sub("<secret>", facts))


def _place(found: re.Match[str]) -> str:
    if found["scheme"] is not None:
        return f"{found['scheme']}://{found['host']}"
    return f".../{found['quoted'] or found['last'] or ''}"


def _words() -> list[tuple[re.Pattern[str], str]]:
    """Return what to replace wherever it stands, longest first, so that no part of it is left."""
    secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 6}
    folders = {os.path.expanduser("~"), os.getcwd(), tempfile.gettempdir()}
    folders |= {os.path.realpath(folder) for folder in folders}
    found = [(re.escape(value), "<secret>") for value in secrets]
    found += [(re.escape(folder), "~") for folder in folders if folder != Path(folder).anchor]
    for name, instead in ((_user(), "<user>"), (platform.node().partition(".")[0], "<host>")):
        # Short names are words of other things, and nobody is called root.
        if len(name) >= 4 and name not in ("root", "localhost"):
            found.append((rf"\b{re.escape(name)}\b", instead))
    return [(re.compile(text), instead) for text, instead in sorted(found, key=lambda pair: -len(pair[0]))]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        return ""
