"""What is refused without a GPU; that replayed steps are right is tested in tests/gpu."""

import pytest
import torch
from torch import nn

import lora_adapters as la
from lora_adapters.errors import RequestError, UnsupportedError


def test_a_model_on_the_cpu_and_one_without_adapters_are_refused():
    with pytest.raises(UnsupportedError, match="call the loss itself"):
        la.GraphedLoss(lambda given: torch.zeros(()), [nn.Parameter(torch.zeros(2))])
    with pytest.raises(RequestError, match="attach an adapter"):
        la.GraphedLoss(lambda given: torch.zeros(()), [nn.Parameter(torch.zeros(2), requires_grad=False)])
