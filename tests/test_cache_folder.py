"""The user's cache folder: where each system has it, and the variable that moves it."""

import sys
from pathlib import Path

import pytest

from lora_adapters.cache_folder import cache_folder


def test_the_variable_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LORA_ADAPTERS_CACHE", str(tmp_path / "own"))
    assert cache_folder("a", "b") == tmp_path / "own" / "a" / "b"
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "{tmp}/xdg"}, "{tmp}/xdg/lora-adapters/a"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "{home}/.cache/lora-adapters/a"),
        ("linux", {}, "{home}/.cache/lora-adapters/a"),
        ("darwin", {"XDG_CACHE_HOME": "{tmp}/xdg"}, "{home}/Library/Caches/lora-adapters/a"),
        ("win32", {"LOCALAPPDATA": "{tmp}/local"}, "{tmp}/local/lora-adapters/a"),
    ],
)
def test_each_system_has_its_own(monkeypatch, tmp_path, system, variables, expected):
    for name in ("LORA_ADAPTERS_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    monkeypatch.setattr(sys, "platform", system)
    assert cache_folder("a") == Path(expected.format(tmp=tmp_path, home=Path.home()))
