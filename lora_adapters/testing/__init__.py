"""Contracts and tiny models for plugin authors and for this project's own tests."""
