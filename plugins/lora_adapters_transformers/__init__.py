"""transformers models: the backend, their target maps and the Trainer callback."""
