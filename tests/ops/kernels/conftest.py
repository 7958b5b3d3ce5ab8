"""Kernel tests run on a CUDA device, or through Triton's interpreter on CPU tensors.

    make kernels                                                                 # the interpreter
    TRITON_INTERPRET=1 LORA_ADAPTERS_KERNELS=interpret pytest tests/ops/kernels   # the same
    pytest tests/ops/kernels                                                     # a CUDA device

The interpreter needs a process of its own: triton reads TRITON_INTERPRET when it is first imported, and the other tests
must see triton as users do.
"""

import pytest
import torch

from lora_adapters.ops import kernels


@pytest.fixture(scope="session")
def device() -> torch.device:
    for name in ["cuda"] * torch.cuda.is_available() + ["cpu"]:
        if kernels.available(torch.device(name)):
            return torch.device(name)
    pytest.skip("needs a CUDA device, or triton's interpreter: make kernels")
