"""An example plugin for lora-adapters: a backend, a quantizer and a task."""
