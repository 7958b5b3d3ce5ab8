"""Which images a timm model takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .heads import pretrained_cfg
from .simulated import forward

#: Sides to try where a model takes one size only and doesn't say which.
_SIDES = (*range(32, 513, 32), 768, 1024)


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model was made for.

    The size is the one that the model was created with (img_size=) where a module of it keeps that, else the one of its
    pretrained weights. A few models take one size only and keep none (LeViT, GCViT, VOLO): of theirs the first one counts
    that a forward pass without data takes. The channels are those of the first convolution.
    """
    config = pretrained_cfg(model)
    channels, *size = config.get("input_size") or (3, 224, 224)
    channels = _channels(model, channels)
    if kept := _kept_size(model):
        return channels, *kept
    pretrained = (channels, *size)
    if not config.get("fixed_input_size"):
        return pretrained
    shapes = (pretrained, *((channels, side, side) for side in _SIDES))
    return next((shape for shape in shapes if _takes(model, shape)), pretrained)


def _takes(model: nn.Module, shape: tuple[int, int, int]) -> bool:
    try:
        forward(model, shape)
    except Exception:  # whatever a forward raises on images of another size
        return False
    return True


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
