"""The diffusers plugin, also where the installed entry points don't name it yet."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def diffusers_plugin(_fresh_plugins):
    pytest.importorskip("diffusers")
    register(importlib.import_module("lora_adapters_diffusers.plugin"))


def register(module):
    """Register the plugin if no entry point has."""
    from lora_adapters.hooks.manager import plugins

    if not any(spec.name == "diffusers" for spec in plugins().backends()):
        plugins().register(module, "diffusers")


@pytest.fixture(scope="module")
def tiny():
    """The module that builds tiny pipelines, importable while a file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield importlib.import_module("pipelines")
