"""LoRA on bitsandbytes' 4-bit and 8-bit linear layers (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from peft.tuners.lora import bnb as peft_bnb

from .linear import LinearFactors


class Linear4bit(LinearFactors, peft_bnb.Linear4bit):
    """LoRA on bitsandbytes' Linear4bit."""


class Linear8bitLt(LinearFactors, peft_bnb.Linear8bitLt):
    """LoRA on bitsandbytes' Linear8bitLt."""
