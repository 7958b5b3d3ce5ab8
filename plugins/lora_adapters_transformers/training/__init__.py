"""The text tasks of `lora-adapters train`: one Runner each, over transformers' Trainer and TRL."""
