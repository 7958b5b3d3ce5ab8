"""Thin subclasses of PEFT's LoRA layers."""
