"""A training run: its folder, its facts, how it is stopped and shown. Tasks (`Runner`) do the training itself."""
