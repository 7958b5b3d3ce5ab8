"""diffusers' own adapter file: one safetensors file for the denoiser and the text encoders of a pipeline.

Keys are `<component>.<module>.lora_A.weight`; the header's `lora_adapter_metadata` is a JSON of every component's
LoraConfig, its fields prefixed by the component (diffusers loaders/lora_base.py). Without that entry diffusers, and
so this reader, take alpha = rank.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from lora_adapters.errors import CheckpointError, UnsupportedError
from lora_adapters.naming import patterns_for, target_modules_for
from lora_adapters.tensor_file import check_finite, read_header, read_tensors

METADATA = "lora_adapter_metadata"
WEIGHT_NAME = "pytorch_lora_weights.safetensors"
_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")


@dataclass(frozen=True)
class Part:
    """What a file holds for one component.

    Attributes:
        tensors: key without the component's name -> tensor, keys as `peft.get_peft_model_state_dict` has them without
            "base_model.model.".
        config: fields of a LoraConfig, or None if the file says nothing of scales.
    """

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any] | None

    @property
    def modules(self) -> list[str]:
        """Return the names of the adapted modules, each once."""
        return list(dict.fromkeys(module_of(key) for key in self.tensors))


def module_of(key: str) -> str:
    """Return the module's name that a key begins with."""
    return next((key.removesuffix(end) for end in _ENDS if key.endswith(end)), key)


def find_file(path: Path, weight_name: str | None = None) -> Path:
    """Return the file that a path means: itself, or the one in a folder.

    Raises:
        CheckpointError: there is none, or several and no `weight_name`.
    """
    if path.is_file():
        return path
    if weight_name is not None or (path / WEIGHT_NAME).is_file():
        found = path / (weight_name or WEIGHT_NAME)
        if found.is_file():
            return found
        raise CheckpointError(f"There is no {found}.")
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        what = f"{len(files)} safetensors files: give weight_name=" if files else "no safetensors file."
        raise CheckpointError(f"{path} holds {what}")
    return files[0]


def read(source: Path | Mapping[str, torch.Tensor], components: Iterable[str]) -> dict[str, Part]:
    """Return component -> what a file, or a state dict, holds for it.

    Raises:
        CheckpointError: the file is damaged, holds no LoRA, or tensors of components that the pipeline lacks.
        UnsupportedError: it is not in diffusers' format.
    """
    if isinstance(source, Path):
        header = read_header(source)
        tensors, metadata, where = read_tensors(source, header)[0], header.metadata, str(source)
    else:
        tensors, metadata, where = dict(source), {}, "the state dict"
        check_finite(tensors, where)
    names = list(components)
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        component = next((name for name in names if key.startswith(name + ".")), None)
        if component is None or not key.endswith(_ENDS):
            raise _not_ours(where, key, names)
        key = key.removesuffix(".weight") if key.endswith("magnitude_vector.weight") else key
        grouped.setdefault(component, {})[key.removeprefix(component + ".")] = tensor
    if not grouped:
        raise CheckpointError(f"{where} holds no tensor.")
    configs = _configs(metadata, where)
    return {component: Part(found, _of(configs, component)) for component, found in grouped.items()}


def _not_ours(where: str, key: str, components: list[str]) -> Exception:
    if key.endswith(_ENDS):
        return CheckpointError(
            f"{where} holds {key!r}, and this pipeline's components are {', '.join(components)}: the adapter was made for "
            "another pipeline."
        )
    return UnsupportedError(
        f"{where} is not in diffusers' format: {key!r} is no LoRA key of PEFT's. pipe.load_lora_weights reads some "
        "other formats."
    )


def _configs(metadata: Mapping[str, str], where: str) -> dict[str, Any] | None:
    if METADATA not in metadata:
        return None
    try:
        found = json.loads(metadata[METADATA])
    except ValueError as error:
        raise CheckpointError(f"{where}: {METADATA} is no JSON ({error}).") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: {METADATA} is no JSON object.")
    return found


def _of(configs: dict[str, Any] | None, component: str) -> dict[str, Any] | None:
    mine = {k.removeprefix(component + "."): v for k, v in (configs or {}).items() if k.startswith(component + ".")}
    return mine or None


def config_of(part: Part, universe: list[str]) -> LoraConfig:
    """Return the LoraConfig of a part; where the file says nothing, alpha = rank in every module.

    Args:
        part: what the file holds.
        universe: the names of all modules of the component.
    """
    if strange := sorted(set(part.modules) - set(universe)):
        raise CheckpointError(
            f"The adapter was made for another model: {len(strange)} of its {len(part.modules)} layers are not in this one, "
            f"first {strange[0]!r}."
        )
    if part.config is not None:
        known = {f.name for f in fields(LoraConfig) if f.init}
        if unknown := sorted(set(part.config) - known):
            raise UnsupportedError(
                f"The file's LoRA metadata has {unknown[0]!r}, which this version of PEFT does not know."
            )
        return LoraConfig(**part.config)
    ranks = {module_of(k): t.shape[1] for k, t in part.tensors.items() if k.endswith(".lora_B.weight")}
    if not ranks:
        raise CheckpointError("The file holds no lora_B.")
    common = Counter(ranks.values()).most_common(1)[0][0]
    by_rank: dict[int, list[str]] = {}
    for name, rank in ranks.items():
        if rank != common:
            by_rank.setdefault(rank, []).append(name)
    pattern = {key: rank for rank, names in by_rank.items() for key in patterns_for(names, universe)}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=target_modules_for(list(ranks), universe),
        use_dora=any("lora_magnitude_vector" in key for key in part.tensors),
        lora_bias=any(key.endswith(".lora_B.bias") for key in part.tensors),
    )


def write(file: Path, parts: Mapping[str, tuple[Mapping[str, torch.Tensor], LoraConfig]]) -> None:
    """Write component -> (tensors, config) as one file, which appears whole or not at all.

    Raises:
        CheckpointError: a value is not finite, or writing failed.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, (values, config) in parts.items():
        tensors |= {f"{component}.{k}": v.detach().to("cpu", copy=True).contiguous() for k, v in values.items()}
        metadata |= {f"{component}.{k}": list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    check_finite(tensors, "The adapter was not saved")
    text = json.dumps(metadata, indent=2, sort_keys=True)
    stage = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, stage, metadata={"format": "pt", METADATA: text})
        os.replace(stage, file)
    except OSError as error:
        raise CheckpointError(f"{file} could not be written: {error}. What was there before is as it was.") from error
    finally:
        stage.unlink(missing_ok=True)
