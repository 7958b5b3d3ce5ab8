"""What is installed here, on which devices, and what of this package works with it: facts that can be pasted anywhere."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

#: Our own variables whose values are names of plugins; of any other only the name is told.
_PLUGIN_NAMES = ("LORA_ADAPTERS_PLUGINS", "LORA_ADAPTERS_DISABLE")


def examine(try_it: bool = True, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Return the facts as strings, numbers, lists and dicts, with nothing private in them.

    Args:
        try_it: try what is quick to try, on tiny tensors; else judge by versions and devices alone.
        say: told what is being tried.

    Returns:
        "versions", "devices", "plugins", "features" (lists of dicts), "environment" (a dict), and "core_works": torch
        and peft are of a supported version and adapters on a dense model work.
    """
    from .devices import devices
    from .features import features
    from .private import paste_ready
    from .versions import packages

    found = packages()
    with _silent():
        machine = devices()
        plugins = _plugins()
        what_works = features({package.name: package for package in found}, machine, plugins, try_it, say)
    return paste_ready(
        {
            "versions": [asdict(package) for package in found],
            "devices": machine,
            "plugins": plugins,
            "features": [asdict(feature) for feature in what_works],
            "environment": _environment(),
            "core_works": next(feature.works for feature in what_works if feature.name == "dense adapters"),
        }
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Keep warnings and log lines of the packages we try out of a terminal that waits for our table."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _plugins() -> list[dict[str, Any]]:
    from ..errors import PluginError
    from ..hooks.manager import plugins

    try:
        return [asdict(status) for status in plugins().status()]
    except PluginError as error:
        # LORA_ADAPTERS_STRICT=1 makes the first broken plugin fatal: that is what every other command meets, too.
        return [{"name": "", "origin": "", "state": "broken", "detail": f"{error}", "hooks": ()}]


def _environment() -> dict[str, Any]:
    ours = sorted(name for name in os.environ if name.startswith("LORA_ADAPTERS_"))
    return {
        "HF_HUB_OFFLINE": "set" if os.environ.get("HF_HUB_OFFLINE") else "not set",
        **{name: os.environ[name] if name in _PLUGIN_NAMES else "set" for name in ours},
    }
