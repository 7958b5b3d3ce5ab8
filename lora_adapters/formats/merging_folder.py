"""Merging into a folder that diffusers wrote: a pipeline's, or that of its denoiser alone."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapter_config import parse_json
from ..errors import CheckpointError, UnsupportedError
from ..tensor_file import Header, read_header
from ..tensor_stream import size_of
from .checkpoint_layers import named_layers
from .folding import changes, merged_metadata
from .merging import FileMerge, MergePlan, read_adapter_for
from .portable import PortableAdapter

_PIPELINE, _CONFIG = "model_index.json", "config.json"
#: Beginning of a pipeline's class -> its family.
_FAMILIES = {"StableDiffusionXL": "sdxl", "StableDiffusion3": "sd3", "Flux": "flux"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
#: Weights in forms that can't be merged into. Beside merged ones they would be old ones.
_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".gguf", ".xml")


def is_diffusers_folder(path: Path) -> bool:
    """Return True for the folder of a pipeline, and of one model of diffusers."""
    if (path / _PIPELINE).is_file():
        return True
    with suppress(CheckpointError):  # Whoever reads it next says so.
        return (path / _CONFIG).is_file() and "_class_name" in _json(path / _CONFIG)
    return False


def plan_folder(
    base: Path, adapter: str | Path, *, scale: float = 1.0, dtype: str | None = None, family: str | None = None
) -> MergePlan:
    """Plan merging into a folder that diffusers wrote. No tensor of it is read.

    Every variant of a component's weights (fp16, ...) is merged into, shards stay shards, and what the adapter does not
    touch is copied. Weights in other forms than safetensors are left out where they would be the unmerged ones.

    Args:
        base: folder with model_index.json, or with config.json of a denoiser.
        adapter, scale, dtype, family: as for `plan_file`.

    Raises:
        CheckpointError: a file is damaged or missing, or the adapter is damaged or made for another model.
        UnsupportedError: the checkpoint is quantized, or stored as pickles.
    """
    whole = (base / _PIPELINE).is_file()
    loaded = read_adapter_for(adapter, _family(base, whole), family)
    places = _places(base, loaded, whole)
    files: dict[str, FileMerge] = {}
    for component, place in places.items():
        part = loaded.with_components({component: loaded.components[component]})
        files |= _component(base, place, component, part, scale)
    copies, left = _others(base, files, places, whole)
    record = {"adapter": Path(adapter).name, "scale": scale, "layers": len(loaded)}
    files = {
        name: replace(f, dtype=dtype, metadata=merged_metadata(f.header.metadata, **record))
        for name, f in files.items()
    }
    if dtype is not None:
        files |= {name: _converted(path, dtype) for name, path in copies.items() if _is_weights(name, whole)}
    texts = _texts(files, copies, dtype) if dtype is not None else {}
    copies = {name: path for name, path in copies.items() if name not in texts and name not in files}
    notes = loaded.notes
    if left:
        notes = (*notes, f"left out, since they hold the weights from before: {', '.join(left)}")
    return MergePlan(loaded.family or _family(base, whole), len(loaded), files, copies, texts, notes)


def _json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}.") from error


def _family(base: Path, whole: bool) -> str:
    """Return the family of a pipeline's folder, "" if its class does not tell."""
    kind = str(_json(base / _PIPELINE).get("_class_name")) if whole else ""
    if kind.startswith("StableDiffusion") and not kind.startswith(("StableDiffusionXL", "StableDiffusion3")):
        config = base / "unet" / _CONFIG
        width = _json(config).get("cross_attention_dim") if config.is_file() else None
        return {768: "sd1", 1024: "sd2"}.get(width if type(width) is int else 0, "")
    return next((family for start, family in _FAMILIES.items() if kind.startswith(start)), "")


def _places(base: Path, adapter: PortableAdapter, whole: bool) -> dict[str, str]:
    """Return component -> its folder, relative to `base`."""
    if whole:
        index = _json(base / _PIPELINE)
        lost = [name for name in adapter.components if not index.get(name) or not (base / name).is_dir()]
        there = [name for name in index if (base / name).is_dir()]
        places = {name: name for name in adapter.components}
    else:
        kind = str(_json(base / _CONFIG)["_class_name"])
        own = "unet" if kind.startswith("UNet") else "transformer"
        lost, there, places = [name for name in adapter.components if name != own], [own], {own: "."}
    if lost:
        raise CheckpointError(
            f"The adapter has layers of the {', '.join(lost)}, and {base} holds {', '.join(there)}. Give the folder of the "
            "whole pipeline that it was trained on."
        )
    for place in places.values():
        if (base / place / _CONFIG).is_file() and _json(base / place / _CONFIG).get("quantization_config"):
            raise UnsupportedError(
                f"{base / place} is quantized, and merging rounds to what it stores. Give the checkpoint of 16 or 32 bits."
            )
    return places


def _component(base: Path, place: str, component: str, adapter: PortableAdapter, scale: float) -> dict[str, FileMerge]:
    """Return the files of one component that the adapter changes."""
    variants: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((base / place).glob("*.safetensors")):
        variants[_SHARD.sub("", path.name)].append(path)
    if not variants:
        raise UnsupportedError(
            f"{base / place} holds no safetensors file, and other forms are not merged into. Save the pipeline with "
            "save_pretrained, which writes safetensors."
        )
    made: dict[str, FileMerge] = {}
    for name, paths in variants.items():
        headers = {path: read_header(path) for path in paths}
        tensors = {key: info for header in headers.values() for key, info in header.tensors.items()}
        slots = named_layers(component, {key: info.shape for key, info in tensors.items()})
        found = changes(adapter, slots, tensors, scale, str(base / place / name))
        made |= {_relative(base, path): file for path, file in _files(headers, found).items() if file.changes}
    return made


def _files(headers: Mapping[Path, Header], found: Mapping[str, Any]) -> dict[Path, FileMerge]:
    return {
        path: FileMerge(path, header, {k: v for k, v in found.items() if k in header.tensors}, header.metadata)
        for path, header in headers.items()
    }


def _converted(path: Path, dtype: str) -> FileMerge:
    header = read_header(path)
    return FileMerge(path, header, {}, header.metadata, dtype)


def _relative(base: Path, path: Path) -> str:
    return path.relative_to(base).as_posix()


def _is_weights(name: str, whole: bool) -> bool:
    return name.endswith(".safetensors") and (not whole or "/" in name)


def _others(
    base: Path, files: Mapping[str, FileMerge], places: Mapping[str, str], whole: bool
) -> tuple[dict[str, Path], list[str]]:
    """Return what to copy, and what is left out: old weights of what is merged, and hidden folders (.git, .cache)."""
    copies: dict[str, Path] = {}
    left: list[str] = []
    merged = {"" if place == "." else f"{place}/" for place in places.values()}
    for folder, folders, names in os.walk(base, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(names):
            name = _relative(base, Path(folder, file))
            inside = name[: -len(file)] in merged
            old = inside and (file.endswith(_OTHER_WEIGHTS) or re.search(r"\.bin\.index", file))
            # At the top of a pipeline's folder, these are the same model in one file.
            old = old or (whole and "/" not in name and file.endswith((".safetensors", *_OTHER_WEIGHTS)))
            if old:
                left.append(name)
            elif name not in files:
                copies[name] = Path(folder, file)
    return copies, left


def _texts(files: Mapping[str, FileMerge], copies: Mapping[str, Path], dtype: str) -> dict[str, str]:
    """Return the configs and indices that say what dtype and size the weights are, with the new ones."""
    texts: dict[str, str] = {}
    for name, path in copies.items():
        if path.name == _CONFIG:
            config = _json(path)
            said = {key: dtype for key in ("dtype", "torch_dtype") if key in config}
            if said:
                texts[name] = json.dumps(config | said, indent=2) + "\n"
        elif ".safetensors.index" in path.name:
            index = _json(path)
            shards = {f"{name[: -len(path.name)]}{shard}" for shard in dict(index.get("weight_map", {})).values()}
            size = sum(size_of(files[shard].header, dtype) for shard in shards if shard in files)
            index["metadata"] = {**dict(index.get("metadata") or {}), "total_size": size}
            texts[name] = json.dumps(index, indent=2) + "\n"
    return texts
