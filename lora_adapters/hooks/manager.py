"""Loads plugins one by one, keeps a status for each, and calls hooks so that one broken plugin stops nobody else."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pluggy

from ..errors import MissingDependencyError, PluginError, PluginWarning
from . import HOOK_API, PROJECT, specs
from .specs import BackendSpec, FormatSpec, LayerSpec, QuantizerSpec, TargetMap, TrainerSpec


@dataclass
class PluginStatus:
    """What became of one plugin.

    Attributes:
        name: entry-point name.
        origin: distribution and version, or the module's name for one registered by hand.
        state: "ready", "needs" (an optional package is missing), "broken" or "blocked".
        detail: what is missing or went wrong, "" when ready.
        hooks: names of the hooks it implements.
    """

    name: str
    origin: str
    state: str = "ready"
    detail: str = ""
    hooks: tuple[str, ...] = ()


def _names(variable: str) -> set[str] | None:
    value = os.environ.get(variable)
    return None if value is None else {part.strip() for part in value.split(",") if part.strip()}


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def load_object(target: str) -> Any:
    """Import "package.module:Name" and return the object."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def require(packages: Iterable[str], extra: str, purpose: str) -> None:
    """Raise MissingDependencyError if one of `packages` can't be imported, naming the extra that installs it."""
    if missing := missing_packages(packages):
        raise MissingDependencyError(f"{purpose} needs {', '.join(missing)}: {install_hint(missing, extra)}")


def missing_packages(packages: Iterable[str]) -> list[str]:
    """Return those of `packages` (import names) that are not installed. Nothing is imported."""
    return [package for package in packages if find_spec(package) is None]


def install_hint(missing: Iterable[str], extra: str) -> str:
    """Return the command that installs what is missing, through an extra of this distribution if there is one."""
    return f"pip install 'lora-adapters[{extra}]'" if extra else f"pip install {' '.join(missing)}"


class PluginManager:
    """The plugins of this process.

    `LORA_ADAPTERS_PLUGINS=a,b` loads only those, `LORA_ADAPTERS_DISABLE=a` blocks some, `LORA_ADAPTERS_TRACE=1` prints
    every hook call to stderr, `LORA_ADAPTERS_STRICT=1` turns a plugin's failure into an error.
    """

    def __init__(self) -> None:
        self._pluggy = pluggy.PluginManager(PROJECT)
        self._pluggy.add_hookspecs(specs)
        self._status: dict[str, PluginStatus] = {}

    # ---- loading -----------------------------------------------------------------------------------------------

    def load_entry_points(self) -> None:
        """Load every plugin that an installed distribution declares, each by itself."""
        for entry in sorted(metadata.entry_points(group=PROJECT), key=lambda e: e.name):
            if entry.name in self._status:
                continue
            origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
            if self._blocked(entry.name, origin):
                continue
            try:
                plugin = entry.load()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                self._fail(entry.name, origin, f"its import failed with {type(error).__name__}: {error}", error)
                continue
            self.register(plugin, entry.name, origin)

    def register(self, plugin: ModuleType | object, name: str, origin: str = "") -> PluginStatus:
        """Register one plugin (a module or an object with hook implementations) and return its status."""
        origin = origin or getattr(plugin, "__name__", type(plugin).__name__)
        if name in self._status and self._status[name].state == "ready":
            raise PluginError(f"A plugin named {name!r} is already registered ({self._status[name].origin}).")
        if self._blocked(name, origin):
            return self._status[name]
        wanted = getattr(plugin, "LORA_ADAPTERS_HOOK_API", HOOK_API)
        if wanted != HOOK_API:
            return self._fail(name, origin, f"it was written for hook API {wanted}; this version has {HOOK_API}")
        unmarked = [n for n in vars(plugin) if n.startswith("lora_adapters_") and self._is_unmarked(plugin, n)]
        if unmarked:
            return self._fail(name, origin, f"{', '.join(unmarked)} lacks the @hookimpl decorator")
        try:
            self._pluggy.register(plugin, name)
            self._pluggy.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._pluggy.has_plugin(name):
                self._pluggy.unregister(name=name)
            return self._fail(name, origin, f"{error}", error)
        hooks = tuple(sorted(caller.name for caller in self._pluggy.get_hookcallers(plugin) or ()))
        self._status[name] = PluginStatus(name, origin, hooks=hooks)
        return self._status[name]

    def unregister(self, name: str) -> None:
        """Forget a plugin."""
        if self._pluggy.has_plugin(name):
            self._pluggy.unregister(name=name)
        self._status.pop(name, None)

    @staticmethod
    def _is_unmarked(plugin: object, name: str) -> bool:
        value = getattr(plugin, name)
        return callable(value) and not isinstance(value, type) and not hasattr(value, f"{PROJECT}_impl")

    def _blocked(self, name: str, origin: str) -> bool:
        only, disabled = _names("LORA_ADAPTERS_PLUGINS"), _names("LORA_ADAPTERS_DISABLE") or set()
        if name in disabled:
            self._status[name] = PluginStatus(name, origin, "blocked", "by LORA_ADAPTERS_DISABLE")
        elif only is not None and name not in only:
            self._status[name] = PluginStatus(name, origin, "blocked", "not named in LORA_ADAPTERS_PLUGINS")
        else:
            return False
        return True

    def _fail(self, name: str, origin: str, detail: str, cause: BaseException | None = None) -> PluginStatus:
        message = f"Plugin {name!r} ({origin}) is set aside: {detail}"
        if _flag("LORA_ADAPTERS_STRICT"):
            raise PluginError(message) from cause
        known = self._status.get(name)
        if known is None or known.state != "broken":
            warnings.warn(message, PluginWarning, stacklevel=3)
        self._status[name] = PluginStatus(name, origin, "broken", detail, known.hooks if known else ())
        return self._status[name]

    # ---- calling -----------------------------------------------------------------------------------------------

    def _call_each(self, hook: str, **arguments: Any):
        """Yield (plugin name, result) of each ready plugin; a failing one is reported and set aside for this call."""
        caller = getattr(self._pluggy.hook, hook)
        order = [impl.plugin_name for impl in reversed(caller.get_hookimpls())]
        for name in dict.fromkeys(order):
            status = self._status[name]
            others = [p for n, p in self._pluggy.list_name_plugin() if p is not None and n != name]
            try:
                result = self._pluggy.subset_hook_caller(hook, others)(**arguments)
            except Exception as error:
                self._fail(name, status.origin, f"{hook} raised {type(error).__name__}: {error}", error)
                continue
            if _flag("LORA_ADAPTERS_TRACE"):
                print(f"lora_adapters: {hook} <- {name}: {result!r:.200}", file=sys.stderr)
            yield name, result

    def collect(self, hook: str, kind: type, **arguments: Any) -> list[tuple[str, Any]]:
        """Call a hook of every plugin and return (plugin, item) pairs of all returned lists."""
        pairs: list[tuple[str, Any]] = []
        for name, results in self._call_each(hook, **arguments):
            items = [item for result in results for item in (result or ())]
            wrong = [item for item in items if not isinstance(item, kind)]
            if wrong:
                detail = f"{hook} must return a list of {kind.__name__}, got {wrong[0]!r:.100}"
                self._fail(name, self._status[name].origin, detail)
                continue
            pairs += [(name, item) for item in items]
        return pairs

    def first(self, hook: str, **arguments: Any) -> tuple[str, Any] | None:
        """Return (plugin, result) of the first plugin whose result is not None."""
        return next(((n, r) for n, r in self._call_each(hook, **arguments) if r is not None), None)

    def notify(self, hook: str, **arguments: Any) -> None:
        """Tell every plugin; a listener that fails is reported, and fatal only with LORA_ADAPTERS_STRICT=1."""
        for _ in self._call_each(hook, **arguments):
            pass

    # ---- what plugins brought ------------------------------------------------------------------------------------

    def status(self) -> list[PluginStatus]:
        """Return the status of every plugin, optional packages checked."""
        specs = self.collect("lora_adapters_backends", BackendSpec)
        specs += self.collect("lora_adapters_quantizers", QuantizerSpec)
        for name, spec in specs:
            missing = missing_packages(spec.requires)
            if missing and self._status[name].state == "ready":
                self._status[name].state, self._status[name].detail = "needs", ", ".join(missing)
        return sorted(self._status.values(), key=lambda s: s.name)

    def backends(self) -> list[BackendSpec]:
        """Return the backends, the preferred one first."""
        found = self.collect("lora_adapters_backends", BackendSpec)
        return sorted((spec for _, spec in found), key=lambda spec: -spec.priority)

    def target_maps(self) -> list[TargetMap]:
        """Return every target map, those of plugins installed later first."""
        return [item for _, item in self.collect("lora_adapters_target_maps", TargetMap)]

    def quantizers(self) -> dict[str, QuantizerSpec]:
        """Return the quantizers by name. A name claimed twice stays with the first; the other plugin is reported."""
        return self._by_name("quantizer", "name", self.collect("lora_adapters_quantizers", QuantizerSpec))

    def trainers(self) -> dict[str, TrainerSpec]:
        """Return the tasks that `train` can run, by name; as `quantizers` for names claimed twice."""
        return self._by_name("task", "task", self.collect("lora_adapters_trainers", TrainerSpec))

    def formats(self, taken: Iterable[str] = ()) -> dict[str, FormatSpec]:
        """Return plugins' formats by name; as `quantizers` for names claimed twice, or that are `taken`."""
        pairs = self.collect("lora_adapters_formats", FormatSpec)
        return self._by_name("format", "name", pairs, dict.fromkeys(taken, ("lora_adapters", None)))

    def _by_name(
        self, kind: str, attribute: str, pairs: list[tuple[str, Any]], taken: dict[str, tuple[str, Any]] | None = None
    ) -> dict[str, Any]:
        found: dict[str, tuple[str, Any]] = dict(taken or {})
        for name, spec in pairs:
            key = getattr(spec, attribute)
            if key in found:
                self._fail(name, self._status[name].origin, f"{kind} {key!r} is already plugin {found[key][0]!r}'s")
                continue
            found[key] = (name, spec)
        return {key: spec for key, (_, spec) in found.items() if key not in (taken or {})}

    def layers(self) -> list[LayerSpec]:
        """Return the layer specs, the preferred one first."""
        found = self.collect("lora_adapters_layers", LayerSpec)
        return sorted((spec for _, spec in found), key=lambda spec: -spec.priority)


@lru_cache(maxsize=1)
def plugins() -> PluginManager:
    """Return the process's plugin manager, entry points loaded. `plugins.cache_clear()` starts afresh."""
    manager = PluginManager()
    manager.load_entry_points()
    return manager
