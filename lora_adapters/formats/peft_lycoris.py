"""PEFT folders of LoHa and LoKr layers (peft.LoHaModel, peft.LoKrModel), whose tensors are named as LyCORIS names them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapter_config import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME, parse_config, parse_json, read_bounded
from ..adapter_file import PREFIX, inside
from ..errors import CheckpointError
from ..tensor_file import read_header, read_tensors
from .factors import Factors, LohaFactors, LokrFactors
from .keys import factors_of, layers_of
from .unet_names import kernel_of

KINDS: Mapping[str, type[Factors]] = {"LOHA": LohaFactors, "LOKR": LokrFactors}
#: Fields that say how the layers were made or trained; what counts of it shows in the tensors.
_TRAINING = ("rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights")
_SHAPING = ("use_effective_conv2d", "decompose_both", "decompose_factor")


@dataclass(frozen=True)
class LycorisFolder:
    """What a folder holds.

    Attributes:
        modules: module, as the folder names it -> factors.
        metadata: the header's string entries. Untrusted.
        notes: what reading changed, and by how much.
    """

    modules: Mapping[str, Factors]
    metadata: Mapping[str, str]
    notes: tuple[str, ...]


def read_folder(folder: Path, family: str) -> LycorisFolder:
    """Read a folder whose `peft_type_of` is one of `KINDS`.

    PEFT's scaling is alpha / r in every layer, LyCORIS' is 1 where both factors of LoKr are whole: there w1 takes it.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        family: for the kernels of flattened convolutions; "" if unknown.

    Raises:
        CheckpointError: it is damaged, or config and weights are of different adapters.
        UnsupportedError: it holds other tensors too (modules trained whole, say).
    """
    raw = parse_json(read_bounded(inside(folder, CONFIG_NAME), MAX_CONFIG_BYTES), CONFIG_NAME)
    kind = KINDS[raw["peft_type"]]
    # The fields that these configs share with LoraConfig mean the same; alpha has another name.
    shared = {("lora_alpha" if name == "alpha" else name): value for name, value in raw.items()}
    shared = {name: value for name, value in shared.items() if name not in (*_TRAINING, *_SHAPING)}
    config = parse_config(json.dumps(shared | {"peft_type": "LORA"}).encode())
    path = inside(folder, WEIGHTS_NAME)
    header = read_header(path)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in read_tensors(path, header)[0].items()}
    layers = layers_of(tensors, str(folder))
    ranks, alphas = config.ranks(layers), config.alphas(layers)
    modules: dict[str, Factors] = {}
    rounded = 0
    for name, layer in layers.items():
        factors = factors_of(layer, str(folder), kernel_of(name, family))
        _check(factors, kind, ranks[name], f"{name[:200]!r} in {folder}")
        if isinstance(factors, LokrFactors) and factors.w1 is not None and factors.w2 is not None:
            modules[name], exact = _scaled(factors, alphas[name] / ranks[name])
            rounded += not exact
        else:
            modules[name] = replace(factors, alpha=float(alphas[name]))
    notes = (f"{rounded} layers of LoKr have their scaling in w1 now, rounded in float32",) if rounded else ()
    return LycorisFolder(modules, header.metadata, notes)


def _check(factors: Factors, kind: type[Factors], rank: int, where: str) -> None:
    if not isinstance(factors, kind):
        raise CheckpointError(f"{where} is {factors.kind}, and its config describes {kind.kind}. Get the folder again.")
    found = [] if isinstance(factors, LokrFactors) else [factors.rank]
    if isinstance(factors, LokrFactors):
        found = [b.shape[0] for b in (factors.w1_b, factors.w2_b) if b is not None]
    if any(one != rank for one in found):
        raise CheckpointError(
            f"{where} has rank {found[0]}, but its config says {rank}. Config and weights are of different adapters; get "
            "the folder again."
        )


def _scaled(factors: LokrFactors, scaling: float) -> tuple[LokrFactors, bool]:
    """Return factors that mean `scaling` times as much, and whether they mean exactly that."""
    assert factors.w1 is not None
    if scaling == 1:
        return factors, True
    wanted = factors.w1.double() * scaling
    w1 = wanted.to(torch.promote_types(factors.w1.dtype, torch.float32))
    return replace(factors, w1=w1), torch.equal(w1.double(), wanted)
