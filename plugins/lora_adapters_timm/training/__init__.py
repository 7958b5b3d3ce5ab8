"""The task image-classification."""
