"""The base model that a recipe names: is it there, what does it take, and how is it built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from lora_adapters.error_text import first_line
from lora_adapters.errors import LoraAdaptersError, RequestError, UnsupportedError

from .. import building

if TYPE_CHECKING:
    from ..recipes import ImageData, ImageModel


def source_of(section: ImageModel) -> str:
    """Return the name that timm.create_model takes, after checking that the model, and its file of weights, are there.

    Raises:
        RequestError: they are not; the message says what to give.
    """
    if section.checkpoint is not None and not Path(section.checkpoint).is_file():
        raise RequestError(f"model.checkpoint: there is no file {section.checkpoint!r}.")
    with _of_the_recipe():
        return building.source_of(section.name, section.revision)


def build(section: ImageModel, classes: int) -> nn.Module:
    """Return the base with its weights and a new classifier, on the CPU.

    What is random (the classifier; all weights with pretrained=false) comes from PyTorch's generator as it is.

    Raises:
        RequestError: an argument that the model does not take. LoraAdaptersError: the weights can't be had.
    """
    return _made(building.create, section, classes, pretrained=section.pretrained, checkpoint=section.checkpoint)


def skeleton(section: ImageModel, image_size: int | None, classes: int) -> nn.Module:
    """Return the model that `build` would, on the meta device; no weight is read.

    A model that is made for one size is made for the recipe's: `img_size` becomes part of `section.timm_kwargs`.
    """
    if image_size is not None and "img_size" not in section.timm_kwargs:
        section.timm_kwargs["img_size"] = image_size
        try:
            return skeleton(section, image_size, classes)
        except RequestError as error:
            if "img_size" not in str(error):
                raise
            del section.timm_kwargs["img_size"]  # it takes every size
    return _made(building.create_on_meta, section, classes)


def data_config(model: nn.Module, section: ImageModel, data: ImageData) -> dict[str, Any]:
    """Return what images must be for this model, as timm.data.create_transform takes it.

    `input_size` (channels, height, width), `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`: the model's own but
    for the recipe's image size, crop and number of channels. Statistics of three colours serve one grey by their mean.
    """
    config = dict(resolve_model_data_config(model, args={"crop_pct": data.crop}))
    size = data.image_size or section.timm_kwargs.get("img_size") or config["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    channels = section.timm_kwargs.get("in_chans") or config["input_size"][0]
    config["input_size"] = (channels, height, width)
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    return config


def check_takes(model: nn.Module, config: dict[str, Any]) -> None:
    """Raise unless the model takes images of that size.

    Args:
        model: on the meta device.
        config: as `data_config` returns it.
    """
    size = config["input_size"]
    own = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if own is None or tuple(own) != tuple(size):  # its own size needs no trial
        try:
            model.eval()(torch.empty(1, *size, device="meta", dtype=next(model.parameters()).dtype))
            model.train()
        except Exception as error:
            raise RequestError(
                f"data.image_size: {type(model).__name__} does not take images of {size[1]} x {size[2]}: "
                f"{first_line(error)}"
            ) from error


def note_size(model: nn.Module, config: dict[str, Any]) -> None:
    """Let the model say which size of images it is used with: tools ask its pretrained_cfg."""
    own = getattr(model, "pretrained_cfg", None)
    if isinstance(own, dict):
        model.pretrained_cfg = {**own, "input_size": config["input_size"]}  # type: ignore[assignment]


def set_checkpointing(model: nn.Module) -> None:
    """Turn gradient checkpointing on.

    Raises:
        UnsupportedError: the model has none.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UnsupportedError(f"{type(model).__name__} has no gradient checkpointing: leave it out.") from error


def _made(make: Callable[..., nn.Module], section: ImageModel, classes: int, **options: Any) -> nn.Module:
    source_of(section)
    options |= {"drop_rate": section.drop_rate, "drop_path_rate": section.drop_path_rate, "revision": section.revision}
    dtype = None if section.dtype == "auto" else getattr(torch, section.dtype)
    with _of_the_recipe():
        return make(section.name, num_classes=classes, dtype=dtype, **{**options, **section.timm_kwargs})


@contextmanager
def _of_the_recipe() -> Iterator[None]:
    """Say of an error which part of the recipe it is about."""
    try:
        yield
    except LoraAdaptersError as error:
        raise type(error)(f"model: {error}") from error
