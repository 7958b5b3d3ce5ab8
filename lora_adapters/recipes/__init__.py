"""Recipes: what `lora-adapters train` is told, checked before anything is loaded. Importing this imports no torch."""
