"""The random generators of a process, for training loops of a task's own: a resumed run must draw what it would have."""

from __future__ import annotations

import random
from typing import Any

import torch


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and PyTorch's generators."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def read_state() -> dict[str, Any]:
    """Return the state of all of them, as plain data and tensors that `torch.load(weights_only=True)` reads."""
    import numpy

    name, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [str(name), keys.tolist(), *rest],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def write_state(state: dict[str, Any]) -> None:
    """Put the generators where `read_state` found them."""
    import numpy

    random.setstate(state["python"])
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
