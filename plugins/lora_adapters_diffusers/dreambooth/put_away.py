"""Parts of a pipeline that are not needed for a while leave the accelerator, and come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.torch_utils import empty_device_cache
from torch import nn


class PutAway:
    """Puts parts of a pipeline away, and brings them back to where they were.

    Args:
        pipe: the pipeline.
        names: parts such as "vae"; those it does not have are left out.
        drop: take them out of the pipeline too, so that nothing moves them back (pipe.to, for one).
    """

    def __init__(self, pipe: Any, names: Sequence[str], drop: bool = False) -> None:
        self.pipe, self.drop = pipe, drop
        self.names = [name for name in names if isinstance(getattr(pipe, name, None), nn.Module)]
        self._away: dict[str, tuple[nn.Module, torch.device]] = {}

    def put(self) -> None:
        """Move the parts to the CPU, and free what they took of the accelerator; those that are away stay there."""
        for name in self.names:
            if name in self._away:
                continue
            part = getattr(self.pipe, name)
            self._away[name] = part, next(part.parameters()).device
            part.to("cpu")
            if self.drop:
                setattr(self.pipe, name, None)
        if any(device.type != "cpu" for _, device in self._away.values()):
            empty_device_cache()

    def back(self) -> None:
        """Bring the parts back; those that are there stay as they are."""
        for name, (part, device) in list(self._away.items()):
            setattr(self.pipe, name, part)  # first: it is there even where the device has no room for it
            part.to(device)
            del self._away[name]

    @contextmanager
    def needed(self) -> Iterator[None]:
        """Within this context what is away is back; after it, away again."""
        away = bool(self._away)
        self.back()
        try:
            yield
        finally:
            if away:
                self.put()
