"""The tests of the fused layers, run on a GPU: against PEFT in fp32, and the error of 16 bits."""

import importlib.util
from pathlib import Path

import layer_checks
import pytest
import torch

pytestmark = pytest.mark.gpu

for _name in ("test_like_peft", "test_precision"):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parents[1] / "layers" / f"{_name}.py")
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    globals().update({f"{key}_{_name}": value for key, value in vars(_module).items() if key.startswith("test_")})


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch):
    monkeypatch.setattr(layer_checks, "DEVICE", "cuda")
    # Or convolutions in fp32 would be computed in TF32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
