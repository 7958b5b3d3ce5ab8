"""LoRA on bitsandbytes' linear layers whose weight others read; see `effective`."""

from __future__ import annotations

from . import bnb
from .effective import EffectiveLinear


class Linear4bit(EffectiveLinear, bnb.Linear4bit):
    """LoRA on a Linear4bit whose weight is read."""


class Linear8bitLt(EffectiveLinear, bnb.Linear8bitLt):
    """LoRA on a Linear8bitLt whose weight is read."""
