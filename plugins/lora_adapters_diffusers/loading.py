"""Loading one model of diffusers, or a whole pipeline, with base weights quantized while they are read, or in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from lora_adapters.device import pick_device
from lora_adapters.error_text import first_line
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

    With `quantization` each layer is quantized when its weight is read, on the device: see `layerwise`.

    Args:
        name: folder with config.json, or Hub name; `subfolder="unet"` in `options` reaches into a pipeline.
        quantization, dtype, device, revision: as for `lora_adapters.load`; dtype "auto" means float32, as in diffusers.
        **options: passed to `from_pretrained`, such as variant.

    Raises:
        RequestError: `name` is no diffusers model, or one that is quantized already. CheckpointError: its weights are
            those of another model, incomplete or not finite.
    """
    cls: Any = model_class(str(Path(name) / options["subfolder"]) if "subfolder" in options else name, revision)
    if cls is None:
        raise RequestError(
            f"{name!r} holds no config.json that names a diffusers model. For a pipeline use LoraPipeline, or load one "
            "of its folders, such as unet."
        )
    target = pick_device(device)
    source = {"revision": revision, **_dtype(dtype), **options}
    if quantization is None:
        return cls.from_pretrained(name, **source).to(target)
    from .layerwise import DiffusersLayerwiseConfig

    if target.type != "cpu":
        source["device_map"] = {"": target}
    with _shapes_checked():
        model = cls.from_pretrained(name, quantization_config=DiffusersLayerwiseConfig(quantization), **source)
    _finish(model, name)
    return model.to(target)


def _finish(model: nn.Module, name: str) -> bool:
    """Return True if a model was quantized layer by layer; raise if another method has quantized it before."""
    from .layerwise import finish

    if not finish(model):
        if getattr(model, "hf_quantizer", None) is not None:
            raise RequestError(f"The weights in {name} are quantized already: leave quantization out.")
        return False
    return True


@contextmanager
def _shapes_checked() -> Iterator[None]:
    """Name what diffusers finds to be of another shape in one of our errors; its advice is for other cases."""
    try:
        yield
    except ValueError as error:
        if "expected shape" not in str(error) or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"Config and weights are of different models. {str(error).split('. If you')[0]}"
        ) from None


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


#: Names that pipelines give their denoisers.
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "dit")


def quantizable(names: Iterable[str]) -> list[str]:
    """Return the denoisers and text encoders among the parts of a pipeline."""
    return [name for name in names if name in DENOISERS or name.startswith("text_encoder")]


def by_component(quantization: Any, parts: Iterable[str], pipeline: str) -> dict[str, Any]:
    """Return component -> what `lora_adapters.attach(quantization=)` takes; {} for None.

    Args:
        quantization: a mapping of that kind, or one quantizer for every denoiser and text encoder.
        parts: names of the pipeline's models.
        pipeline: what errors call it.

    Raises:
        RequestError: a component that the pipeline lacks, or one that stays dense.
    """
    names = quantizable(parts)
    if quantization is None:
        return {}
    if not isinstance(quantization, Mapping):
        return dict.fromkeys(names, quantization)
    for name in quantization:
        if name not in names:
            why = " Autoencoders and other parts stay dense." if name in parts or name == "vae" else ""
            raise RequestError(f"{pipeline} has no part {name!r} to quantize. It has: {names}.{why}")
    return {name: wanted for name, wanted in quantization.items() if wanted is not None}


def load_pipeline(name: str, pipeline: str | None = None, quantization: Any = None, **options: Any) -> Any:
    """Load a pipeline from a folder, a single file (the form that UIs load) or the Hub.

    Args:
        name: path or Hub name.
        pipeline: name of the class that reads a single file; None tells it from the file's tensors.
        quantization: as for `by_component`. Layers are quantized when they are read, the text encoders of a single file
            afterwards.
        **options: passed to diffusers. A single file needs `config=`, a folder with the pipeline's configs, where there is
            no network.

    Raises:
        RequestError: what a single file holds is not known, or an unknown component. CheckpointError: a part to quantize
            has weights of another model, incomplete or not finite.
    """
    import diffusers

    single = Path(name).is_file()
    cls: Any = getattr(diffusers, pipeline or _kind_of(Path(name))) if single else diffusers.DiffusionPipeline
    if quantization is None:
        return (cls.from_single_file if single else cls.from_pretrained)(name, **options)
    return (_quantized_file if single else _quantized_folder)(cls, name, quantization, options)


def _quantized_folder(cls: Any, name: str, quantization: Any, options: dict[str, Any]) -> Any:
    from diffusers import PipelineQuantizationConfig

    from .layerwise import DiffusersLayerwiseConfig, TransformersLayerwiseConfig

    if "quantization_config" in options:
        raise RequestError("Give quantization or quantization_config, not both.")
    known = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
    index = cls.load_config(name, **{key: options[key] for key in known if key in options})
    classes = {
        part: value
        for part, value in index.items()
        if isinstance(value, list | tuple) and value[0] and options.get(part, value) is not None
    }
    wanted = by_component(quantization, classes, str(index.get("_class_name", name)))
    while_reading = {
        part: (DiffusersLayerwiseConfig if classes[part][0] == "diffusers" else TransformersLayerwiseConfig)(how)
        for part, how in wanted.items()
        if part not in options
    }
    if while_reading:
        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping=while_reading)
    with _shapes_checked():
        pipe = cls.from_pretrained(name, **options)
    vars(pipe).pop("quantization_config", None)
    _quantize_rest(pipe, wanted, name)
    return pipe


def _quantized_file(cls: Any, name: str, quantization: Any, options: dict[str, Any]) -> Any:
    from diffusers.loaders import FromOriginalModelMixin

    from .layerwise import DiffusersLayerwiseConfig

    types = {part: found for part, found in cls._get_signature_types().items() if options.get(part, found) is not None}
    wanted = by_component(quantization, types, cls.__name__)
    known = ("torch_dtype", "dtype", "config", "original_config", "local_files_only", "token", "revision", "cache_dir")
    known += ("disable_mmap", "force_download", "proxies")
    for part, how in wanted.items():
        model: Any = types[part][0]
        if part not in options and issubclass(model, FromOriginalModelMixin):
            source = {key: options[key] for key in known if key in options} | {"subfolder": part}
            config = DiffusersLayerwiseConfig(how)
            with _shapes_checked():
                options[part] = model.from_single_file(name, quantization_config=config, **source)
    pipe = cls.from_single_file(name, **options)
    _quantize_rest(pipe, wanted, name)
    return pipe


def quantize_parts(models: Mapping[str, nn.Module], wanted: Mapping[str, Any]) -> None:
    """Quantize several parts of a pipeline in memory; what can't be quantized is an error before any is changed."""
    for part, how in wanted.items():
        quantizers_of(models[part], how)
    for part, how in wanted.items():
        quantize(models[part], how)


def _quantize_rest(pipe: Any, wanted: Mapping[str, Any], name: str) -> None:
    """Quantize in memory what was not quantized while it was read."""
    models = {part: getattr(pipe, part) for part in wanted}
    rest = [part for part, model in models.items() if model is not None and not _finish(model, name)]
    quantize_parts(models, {part: wanted[part] for part in rest})


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
        reason = first_line(error)[:200]
        raise CheckpointError(
            f"There is no file or folder {name!r} here, and the Hub gave no such adapter ({reason}). Check the path."
        ) from error
    if not any(path.rglob("*.safetensors")):
        raise CheckpointError(
            f"{name} on the Hub holds neither {' nor '.join(names[:3])}. Give weight_name=, its file."
        )
    return path
