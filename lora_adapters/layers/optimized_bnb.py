"""PEFT's layers over bitsandbytes with another forward; see `optimized`."""

from __future__ import annotations

from peft.tuners.lora import bnb as peft_bnb

from .fused import FusedLinear


class Linear4bit(FusedLinear, peft_bnb.Linear4bit):
    """PEFT's LoRA on bitsandbytes' Linear4bit."""


class Linear8bitLt(FusedLinear, peft_bnb.Linear8bitLt):
    """PEFT's LoRA on bitsandbytes' Linear8bitLt."""
