"""The base pipeline that a recipe names: built without its weights to plan with, and loaded to train."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from lora_adapters.error_text import first_line
from lora_adapters.errors import LoraAdaptersError, RequestError
from lora_adapters.tensor_file import read_header

from .. import loading

if TYPE_CHECKING:
    from ..recipes import PipelineModel

_INDEX = "model_index.json"
#: A dtype as safetensors writes it -> PyTorch's.
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: What of a pipeline on the Hub says how it is built: configs, tokenizers, schedulers.
_SMALL_FILES = ("*.json", "*/*.json", "*/*.txt", "*/*.model")


def skeleton(section: PipelineModel) -> Any:
    """Return the recipe's pipeline with its models on the meta device; no weight is read.

    Of a single file without `config`, which alone does not say how its pipeline is built, the weights are read.

    Raises:
        RequestError: there is no such pipeline.
    """
    import diffusers

    folder = _folder_of_configs(section)
    if folder is None:
        return load(section)
    index = _index(folder)
    models: dict[str, Any] = {}
    for name, entry in index.items():
        cls = _model_class(entry)
        if cls is not None:
            models[name] = _on_meta(cls, folder / name, _dtype(section, folder) or torch.float32)
    with _of_the_recipe():
        return diffusers.DiffusionPipeline.from_pretrained(folder, **models, local_files_only=True)


def load(section: PipelineModel, quantization: Any = None) -> Any:
    """Return the recipe's pipeline with its weights, on the CPU.

    Args:
        section: where it is, and in which dtype.
        quantization: what `quantization_of` returned: these layers are quantized while they are read. None: all dense.

    Raises:
        RequestError: there is no such pipeline, or it can't be read.
    """
    import diffusers

    path, folder = Path(section.name).expanduser(), _folder_of_configs(section)
    options: dict[str, Any] = {"revision": section.revision, "variant": section.variant, "config": section.config}
    options = {key: value for key, value in options.items() if value is not None}
    with _of_the_recipe():
        if not path.exists():  # its files, by which their dtype can be told, come before it is built
            folder = Path(diffusers.DiffusionPipeline.download(section.name, **options))
        if (dtype := _dtype(section, folder)) is not None:
            options["dtype"] = dtype
        name = str(path) if path.exists() else section.name
        return loading.load_pipeline(name, quantization=quantization or None, **options)


def quantization_of(quantization: Any, denoiser: str, encoders: list[str]) -> dict[str, Any]:
    """Return component -> quantizer or mapping of roles to one, of what a recipe says.

    Raises:
        RequestError: there is no such component.
    """
    if quantization is None:
        return {}
    if not isinstance(quantization, dict):
        return dict.fromkeys([denoiser, *encoders], quantization)
    for name in quantization:
        if name not in (denoiser, *encoders):
            raise RequestError(
                f"model.quantization: the pipeline has no part {name!r} that can be quantized. It has: "
                f"{', '.join([denoiser, *encoders])}."
            )
    return dict(quantization)


def _folder_of_configs(section: PipelineModel) -> Path | None:
    path = Path(section.name).expanduser()
    if section.revision is not None and path.exists():
        raise RequestError(f"model.revision: it is for a name on the Hub, and {path} is here: leave it out.")
    if path.is_file():
        if section.variant is not None:
            raise RequestError(
                "model.variant: it is for a folder or a name on the Hub; a single file is one: leave it out."
            )
        return None if section.config is None else Path(section.config)
    if section.config is not None:
        raise RequestError("model.config: it is for a single file, and model.name is none: leave it out.")
    if path.is_dir():
        if not (path / _INDEX).is_file():
            raise RequestError(f"model.name: {path} has no {_INDEX}, so it is no pipeline in diffusers' layout.")
        return path
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(section.name, revision=section.revision, allow_patterns=list(_SMALL_FILES)))
        if (found / _INDEX).is_file():
            return found
        reason = f"it has no {_INDEX}"
    except Exception as error:  # its errors share no base class
        reason = first_line(error)[:200]
    raise RequestError(
        f"model.name: there is no folder or file {section.name!r} here, and the Hub gave no such pipeline ({reason})."
    )


def _index(folder: Path) -> dict[str, list[Any]]:
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return {name: entry for name, entry in index.items() if isinstance(entry, list)}
    except (OSError, ValueError, AttributeError) as error:
        raise RequestError(f"model: {folder / _INDEX} can't be read: {error}") from error


def _model_class(entry: list[Any]) -> Any:
    """Return the class of an entry of the index if it is a model of diffusers or transformers, else None."""
    import importlib

    library, name = entry[0], entry[1]
    if library not in ("diffusers", "transformers"):
        return None
    found = getattr(importlib.import_module(library), str(name), None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _on_meta(cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            if hasattr(cls, "load_config"):  # a diffusers model
                return cls.from_config(cls.load_config(folder, local_files_only=True))
            return cls(cls.config_class.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"model: {folder} can't be read: {first_line(error)}") from error
    finally:
        torch.set_default_dtype(usual)


def _dtype(section: PipelineModel, folder: Path | None) -> torch.dtype | None:
    return _stored_dtype(section, folder) if section.dtype == "auto" else getattr(torch, section.dtype)


def _stored_dtype(section: PipelineModel, folder: Path | None) -> torch.dtype | None:
    """Return the dtype of the denoiser's stored weights, which diffusers would widen; None where they are not here."""
    file = Path(section.name).expanduser()
    if file.is_file():
        files = [file]
    else:
        there = [path for part in ("unet", "transformer") for path in sorted((folder or file).glob(f"{part}/*"))]
        files = [path for path in there if _variant_of(path) == section.variant]
    for file in files:
        if file.suffix == ".safetensors":
            found = [_DTYPES[info.dtype] for info in read_header(file).tensors.values() if info.dtype in _DTYPES]
            return max(set(found), key=found.count) if found else None
    return None


def _variant_of(file: Path) -> str | None:
    """Return "fp16" of x.fp16.safetensors, and of one of several: x.fp16-00001-of-00002, or older x-00001-of-00002.fp16."""
    name = re.sub(r"-\d+-of-\d+", "", file.stem)
    return name.partition(".")[2] or None


@contextmanager
def _of_the_recipe() -> Iterator[None]:
    """Say of an error which part of the recipe it is about; diffusers and transformers show no bars meanwhile."""
    try:
        with _without_bars(diffusers_logging), _without_bars(transformers_logging):
            yield
    except LoraAdaptersError as error:
        raise type(error)(f"model: {error}") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = first_line(error)[:300]
        raise RequestError(f"model: the pipeline can't be read: {reason}") from error


@contextmanager
def _without_bars(logging: Any) -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
