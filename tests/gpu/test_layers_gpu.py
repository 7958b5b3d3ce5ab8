"""The tests of the fused layers, run on a GPU: against PEFT in fp32, and the error of 16 bits."""

import importlib.util
from pathlib import Path

import layer_checks
import pytest
import torch

from lora_adapters.ops.dropout import draw_masks

pytestmark = pytest.mark.gpu

for _name in ("test_like_peft", "test_precision"):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parents[1] / "layers" / f"{_name}.py")
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    globals().update({f"{key}_{_name}": value for key, value in vars(_module).items() if key.startswith("test_")})


# torch's dropout on a GPU has a kernel of its own: masks that do not depend on the dtype are had on the CPU only.
_module.FACTORS[:] = [factors for factors in _module.FACTORS if not factors[3]]


def _dropped(layer, x):
    if not layer.training:
        return x
    (mask,), _ = draw_masks(x, (layer.p,), x.dtype)
    return x if mask is None else x * mask / (1 - layer.p)


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch):
    monkeypatch.setattr(layer_checks, "DEVICE", "cuda")
    # PEFT's dropout draws the masks that ours draws, so that what is done with them can be compared.
    monkeypatch.setattr(torch.nn.Dropout, "forward", _dropped)
    # Or convolutions in fp32 would be computed in TF32, and cuBLAS would round partial sums of small products.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for kind in ("bf16", "fp16"):
        monkeypatch.setattr(torch.backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction", False)
