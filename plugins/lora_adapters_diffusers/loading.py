"""Loading one model of diffusers, or a whole pipeline, with base weights quantized in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from lora_adapters.device import pick_device
from lora_adapters.errors import CheckpointError, RequestError
from lora_adapters.formats.source import DIFFUSERS_NAME
from lora_adapters.quantized import quantizers_of
from lora_adapters.tensor_file import read_header
from lora_adapters.weights import mark_quantized, quantize_modules


def model_class(name: str, revision: str | None = None) -> type | None:
    """Return the diffusers class that a folder's, or a Hub model's, config.json names; None if it names none."""
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin

    file = Path(name) / "config.json"
    try:
        if not file.is_file():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(name, "config.json", revision=revision))
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = getattr(diffusers, str(config.get("_class_name", "")), None) if isinstance(config, dict) else None
    return found if isinstance(found, type) and issubclass(found, ModelMixin) else None


def load(
    name: str, *, quantization: Any, dtype: torch.dtype | str, device: str, revision: str | None, **options: Any
) -> nn.Module:
    """Load one model (not a pipeline) by folder or name.

    The dense weights are read first and quantized one layer at a time on the CPU, so that takes the dense model's memory
    there; the device gets the small one.

    Args:
        name: folder with config.json, or Hub name; `subfolder="unet"` in `options` reaches into a pipeline.
        quantization, dtype, device, revision: as for `lora_adapters.load`; dtype "auto" takes the checkpoint's.
        **options: passed to `from_pretrained`.

    Raises:
        RequestError: `name` is no diffusers model.
    """
    cls: Any = model_class(str(Path(name) / options["subfolder"]) if "subfolder" in options else name, revision)
    if cls is None:
        raise RequestError(
            f"{name!r} holds no config.json that names a diffusers model. For a pipeline use LoraPipeline, or load one "
            "of its folders, such as unet."
        )
    model = cls.from_pretrained(name, revision=revision, **_dtype(dtype), **options)
    quantize(model, quantization)
    return model.to(pick_device(device))


def _dtype(dtype: torch.dtype | str) -> dict[str, Any]:
    if dtype == "auto":
        return {}
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise RequestError(f"dtype must be 'auto' or a torch dtype, got {dtype!r}.")
    return {"torch_dtype": found}


def quantize(model: nn.Module, quantization: Any) -> dict[str, str]:
    """Quantize a model's base weights in place, layer by layer; return module name -> format. None does nothing.

    What stays dense is what `attach(quantization=...)` leaves dense: see `lora_adapters.quantized`.
    """
    if quantization is None:
        return {}
    quantizers = quantizers_of(model, quantization)
    compute = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    quantize_modules(model, quantizers, compute)
    if quantizers:
        mark_quantized(model, next(iter(quantizers.values())))
    return {name: quantizer.name for name, quantizer in quantizers.items()}


#: Beginning of what diffusers calls a single file's kind -> the pipeline that reads it.
_SINGLE_FILES = {
    "xl_base": "StableDiffusionXLPipeline",
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}


def load_pipeline(name: str, pipeline: str | None = None, **options: Any) -> Any:
    """Load a pipeline from a folder, a single file (the form that UIs load) or the Hub.

    Args:
        name: path or Hub name.
        pipeline: name of the class that reads a single file; None tells it from the file's tensors.
        **options: passed to diffusers. A single file needs `config=`, a folder with the pipeline's configs, where there is
            no network.

    Raises:
        RequestError: what a single file holds is not known.
    """
    import diffusers

    if Path(name).is_file():
        return getattr(diffusers, pipeline or _kind_of(Path(name))).from_single_file(name, **options)
    return diffusers.DiffusionPipeline.from_pretrained(name, **options)


def _kind_of(file: Path) -> str:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    kind = ""
    if file.suffix == ".safetensors":
        # It looks at names and shapes only, which the header has.
        kind = infer_diffusers_model_type(read_header(file).tensors)
    found = next((cls for start, cls in _SINGLE_FILES.items() if kind.startswith(start)), None)
    if found is None:
        raise RequestError(
            f"Which pipeline {file} is for can't be told{f' (diffusers calls it {kind!r})' if kind else ''}: give "
            "pipeline=, such as 'StableDiffusionPipeline'."
        )
    return found


def adapter_path(name: str, weight_name: str | None, revision: str | None) -> Path:
    """Return where an adapter's file or folder is; of one on the Hub its files are downloaded.

    Args:
        name: path or Hub name.
        weight_name: file in the folder; None leaves open which.
        revision: Hub revision.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(name).expanduser()
    if not path.exists():
        path = _downloaded(name, weight_name, revision)
    if weight_name is None or path.is_file():
        return path
    if not (path / weight_name).is_file():
        raise CheckpointError(f"There is no {path / weight_name}.")
    return path / weight_name


def _downloaded(name: str, weight_name: str | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    # By name: a repository may hold a whole base model beside the adapter.
    names = [weight_name] if weight_name else [CONFIG_NAME, WEIGHTS_NAME, DIFFUSERS_NAME]
    names += [] if weight_name else [f"*/{file}" for file in (CONFIG_NAME, WEIGHTS_NAME)]
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=names))
    except Exception as error:  # its errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"There is no file or folder {name!r} here, and the Hub gave no such adapter ({reason}). Check the path."
        ) from error
    if not any(path.rglob("*.safetensors")):
        raise CheckpointError(
            f"{name} on the Hub holds neither {' nor '.join(names[:3])}. Give weight_name=, its file."
        )
    return path
