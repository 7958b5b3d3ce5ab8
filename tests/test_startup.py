"""Importing is cheap, and no module shadows a public function."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "peft", "transformers", "bitsandbytes", "numpy")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import lora_adapters, lora_adapters.errors",
        "import lora_adapters_transformers, lora_adapters_transformers.plugin",
        "from lora_adapters.cli import cli; cli.main(['--help'], standalone_mode=False)",
        "from lora_adapters.cli import cli; cli.main(['plugins'], standalone_mode=False)",
        "from lora_adapters.hooks.manager import plugins; plugins().backends(); plugins().target_maps()",
    ],
)
def test_nothing_heavy_is_imported(code):
    tail = f"; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    assert run(code + tail).strip().splitlines()[-1] == "[]"


def test_public_names_survive_importing_every_submodule():
    code = """
import importlib, json, pkgutil, types
import lora_adapters as la
for info in pkgutil.walk_packages(la.__path__, "lora_adapters."):
    importlib.import_module(info.name)
print(json.dumps({name: type(getattr(la, name)).__name__ for name in la.__all__}))
print(json.dumps(sorted(n for n in la._LAZY if isinstance(vars(la).get(n), types.ModuleType))))
"""
    kinds, shadowed = map(json.loads, run(code).splitlines()[-2:])
    assert shadowed == []
    assert kinds.pop("__version__") == "str"
    assert {kinds.pop(name) for name in ("Adapter", "GraphedLoss", "LoraAdaptersError")} == {"type"}
    assert kinds.pop("hookimpl") == "HookimplMarker"
    assert set(kinds.values()) == {"function"}


def test_an_unknown_name_is_an_attribute_error():
    import lora_adapters

    with pytest.raises(AttributeError, match="nonsense"):
        lora_adapters.nonsense  # noqa: B018
    assert "attach" in dir(lora_adapters)
