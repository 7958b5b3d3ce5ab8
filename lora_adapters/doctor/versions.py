"""Installed versions against the ranges that our own distribution states. Imports none of the packages."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from .. import __version__

DISTRIBUTION = "lora-adapters"
#: Distributions, each named as its module is.
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "timm",
    "trl",
    "datasets",
    "triton",
    "liger_kernel",
    "safetensors",
    "huggingface_hub",
)
#: What we don't require ourselves -> the package that brings it.
_BROUGHT_BY = {"triton": "torch, where it has a build for it", "huggingface_hub": "peft"}


@dataclass(frozen=True)
class Package:
    """One package as it is installed here.

    Attributes:
        name: its name; "python" and "platform" are listed, too.
        version: the installed version, or "not installed".
        supported: the versions we support, such as ">=2.11", or "" if we state none.
        extra: the extra of `lora-adapters` that brings it, or "".
        problem: "", or what is wrong.
        what_to_do: "", or how to mend it.
    """

    name: str
    version: str
    supported: str = ""
    extra: str = ""
    problem: str = ""
    what_to_do: str = ""


def packages() -> list[Package]:
    """Return python, the platform, ourselves, and every package of `PACKAGES`."""
    try:
        ours = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        python, stated = "", {}
        ourselves = Package(
            "lora_adapters",
            __version__,
            problem="it is on the path but not installed, so the versions it supports are not known",
            what_to_do=f"pip install {DISTRIBUTION}, or in a clone: pip install -e .",
        )
    else:
        python, stated = "".join(ours.get_all("Requires-Python") or []), _stated(ours.get_all("Provides-Extra") or [])
        ourselves = Package("lora_adapters", __version__)
    return [
        _judged("python", platform.python_version(), python, "", f"Install Python {python}"),
        Package("platform", platform.platform()),
        ourselves,
        *(_package(name, *stated.get(name, ("", ""))) for name in PACKAGES),
    ]


def _stated(extras: list[str]) -> dict[str, tuple[str, str]]:
    """Return package -> (supported versions, the extra that brings it or "" if we always do)."""
    stated: dict[str, tuple[str, str]] = {}
    sizes: dict[str, int] = {}
    requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    brought = {extra: [r for r in requirements if _applies(r, extra)] for extra in ("", *extras)}
    for extra, its in brought.items():
        for requirement in its:
            name = requirement.name.replace("-", "_")
            # "all" brings everything: name the extra that brings least besides.
            if name not in stated or (stated[name][1] and len(its) < sizes[name]):
                stated[name], sizes[name] = (_range(requirement), extra), len(its)
    return stated


def _range(requirement: Requirement) -> str:
    """Return ">=5.17,<6": the lower bound first."""
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _package(name: str, supported: str, extra: str) -> Package:
    version = _version(name)
    install = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install '{name}{supported}'"
    if name in _BROUGHT_BY:
        install = f"It comes with {_BROUGHT_BY[name]}"
    try:
        importable = find_spec(name) is not None
    except ValueError:  # a module that some program put together by hand
        importable = True
    if version is None and not importable:
        return Package(name, "not installed", supported, extra, "not installed", install)
    if version is None:
        problem = "its module is on the path, but it is not installed, so its version is not known"
        return Package(name, "unknown", supported, extra, problem, install)
    if not importable:
        problem = f"{version} is installed, but there is no module to import"
        return Package(name, version, supported, extra, problem, f"pip install --force-reinstall '{name}{supported}'")
    return _judged(name, version, supported, extra, f"pip install '{name}{supported}'")


def _version(name: str) -> str | None:
    try:
        # A folder left behind by a broken installation has no version.
        return metadata.version(name) or "unknown"
    except metadata.PackageNotFoundError:
        return None
    except KeyError:
        return "unknown"


def _judged(name: str, version: str, supported: str, extra: str, what_to_do: str) -> Package:
    try:
        fits = SpecifierSet(supported).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return Package(name, version, supported, extra, f"its version {version!r} can't be read", what_to_do)
    if fits:
        return Package(name, version, supported, extra)
    return Package(name, version, supported, extra, f"{version} is outside the supported {supported}", what_to_do)
