"""Settings for every test: no network, one thread, no plugin state carried from one test to the next."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def pytest_collection_modifyitems(items):
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_plugins(monkeypatch):
    """Give each test the installed plugins and nothing another test registered."""
    from lora_adapters.hooks.manager import plugins

    for variable in ("PLUGINS", "DISABLE", "TRACE", "STRICT"):
        monkeypatch.delenv(f"LORA_ADAPTERS_{variable}", raising=False)
    yield
    plugins.cache_clear()
