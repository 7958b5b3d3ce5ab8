"""What the demo measures of samples: how many show the subject, and how varied those of the class are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .digits import WORDS


def share(named: Tensor, digit: int) -> float:
    """Return which share (0 to 1) of samples shows a digit.

    Args:
        named: (samples,) what the judge says each shows.
        digit: the one that counts.
    """
    return float((named == digit).float().mean())


def variety(named: Tensor) -> float:
    """Return the effective number of digits among samples: exp of the Shannon entropy of their frequencies (Hill number of
    order 1; Hill, Ecology 54, 1973). 1: all alike; n: n digits, equally often.

    Args:
        named: (samples,) what the judge says each shows.
    """
    counts = torch.bincount(named, minlength=len(WORDS))
    shares: Sequence[float] = (counts[counts > 0] / counts.sum()).tolist()
    return math.exp(-sum(p * math.log(p) for p in shares))
