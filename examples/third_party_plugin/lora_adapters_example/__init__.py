"""An example plugin for lora-adapters: a backend and a quantizer."""
