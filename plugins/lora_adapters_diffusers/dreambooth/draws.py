"""Where random numbers come from: nothing but the seed and what they are for."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Use(IntEnum):
    """What numbers are drawn for. Each has its own, so that an option changes nothing but what it is about."""

    CAPTION = 0
    PICTURE = 1
    ORDER = 2
    PRIOR = 3
    HELD_OUT = 4


def draws(use: Use, seed: int, *numbers: int) -> np.random.Generator:
    """Return a generator that begins from these numbers, whatever has been drawn before and in whichever process."""
    return np.random.default_rng(np.random.SeedSequence((seed, *numbers), spawn_key=(int(use),)))
