"""Which images a timm model takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .heads import pretrained_cfg


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model was made for.

    The size is the one that the model was created with (img_size=) where a module of it keeps that, else the one of its
    pretrained weights; the channels are those of the first convolution.
    """
    config = pretrained_cfg(model)
    channels, *size = config.get("input_size") or (3, 224, 224)
    return _channels(model, channels), *(_kept_size(model) or tuple(size))


def images(model: nn.Module, batch_size: int, device: Any) -> torch.Tensor:
    """Return random images (batch_size, channels, height, width) in the dtype of the model's floating weights."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    return torch.randn(batch_size, *image_shape(model), device=device, dtype=torch.float32).to(dtype)


def _kept_size(model: nn.Module) -> tuple[int, int] | None:
    for module in model.modules():
        size = vars(module).get("img_size")
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(s, int) for s in size):
            return size[0], size[1]
    return None


def _channels(model: nn.Module, default: int) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            known = vars(module).get("in_channels", default)
            return known if known in (1, 2, 3, 4) else default
    return default
