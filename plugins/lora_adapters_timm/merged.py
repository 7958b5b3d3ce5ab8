"""A plain timm model's folder: weights under timm's own keys, and the config.json by which timm builds the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

from lora_adapters.errors import RequestError
from lora_adapters.staging import new_folder

from .facts import Facts

WEIGHTS = "model.safetensors"


def write_merged(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> Path:
    """Write weights and config into a new folder, whole or not at all, and return it.

    Raises:
        RequestError: there is something at `path` already.
    """
    folder = Path(os.path.realpath(path.expanduser()))
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{path} is there already. Give a folder that does not exist yet.")
    with new_folder(folder) as stage:
        write_files(model, state, stage)
    return folder


def write_files(model: nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write model.safetensors and config.json into a folder.

    A backbone that gives features (features_only) gets no config: timm's are for classifiers.
    """
    found: Any = model
    # Copies: tensors that share memory are refused.
    values = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    save_file(values, folder / WEIGHTS, {"format": "pt"})
    if getattr(found, "pretrained_cfg", None) and hasattr(found, "num_classes"):
        save_config_for_hf(found, folder / "config.json", model_args=dict(Facts.of(model).arguments) or None)
