"""The Triton kernels: the effective weight of a 4-bit layer, and the skinny products of LoRA.

Importing this package needs no triton. Ask `available(device)` first; the functions are imported by then.

The environment variable LORA_ADAPTERS_KERNELS says which kernels may run:
    auto (or unset): on NVIDIA GPUs of compute capability 7.5 or more, if triton is installed;
    off: none;
    interpret: only for tests: on CPU tensors, through Triton's interpreter (thousands of times slower). It also needs
        TRITON_INTERPRET=1, set before triton is first imported.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import torch

from ...errors import RequestError
from ...weights.primitives import FLOATS

if TYPE_CHECKING:
    from .dequant_merge import dequantize_merge
    from .lowrank import add_up, down, down_grad, up, up_grads, up_grads_pays

__all__ = ["add_up", "available", "dequantize_merge", "down", "down_grad", "up", "up_grads", "up_grads_pays"]

#: The least compute capability that Triton compiles these kernels for.
MIN_CAPABILITY = (7, 5)
_ANSWERS: dict[torch.device, bool] = {}
_HOMES = {
    "add_up": "lowrank",
    "dequantize_merge": "dequant_merge",
    "down": "lowrank",
    "down_grad": "lowrank",
    "up": "lowrank",
    "up_grads": "lowrank",
    "up_grads_pays": "lowrank",
}


def available(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Return whether the functions of this package take tensors of this device, and of these dtypes if any are given.

    The answer is found once for each device, which imports triton if it is True; from then on it costs nothing. In
    compiled code it is a constant.
    """
    return _answer(device) and all(dtype in FLOATS for dtype in dtypes)


@torch.compiler.assume_constant_result  # torch.compile calls this and does not trace it: it traces no imports
def _answer(device: torch.device) -> bool:
    answer = _ANSWERS.get(device)
    if answer is None:
        answer = _ANSWERS[device] = _decide(device)
    return answer


def _decide(device: torch.device) -> bool:
    setting = os.environ.get("LORA_ADAPTERS_KERNELS", "auto")
    if setting not in ("auto", "off", "interpret"):
        raise RequestError(f"LORA_ADAPTERS_KERNELS must be 'auto', 'off' or 'interpret', not {setting!r}.")
    interpreting = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    if device.type == "cpu":
        return setting == "interpret" and interpreting and _import()
    if device.type != "cuda" or setting != "auto" or interpreting or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY and _import()


def _import() -> bool:
    """Import the kernels' modules, so that compiled code finds them; False where triton is missing or does not load."""
    try:
        import triton  # noqa: F401
    except (ImportError, OSError):
        return False
    globals().update({name: _load(name) for name in _HOMES})
    return True


def _load(name: str) -> Any:
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return _load(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
