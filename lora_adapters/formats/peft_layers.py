"""A component as layers of PEFT: as LoHa or LoKr where PEFT's layers are exactly those of the file, else as LoRA.

PEFT makes the shapes of LoKr's factors from one config for all layers; it can hold a file's where they come out the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .factors import Factors, LohaFactors, LokrFactors
from .keys import tensors_for
from .peft_fields import as_lora, lycoris_fields


@dataclass(frozen=True)
class PeftForm:
    """What to inject into a model, and what to load into it.

    Attributes:
        peft_type: "LORA", "LOHA" or "LOKR": the config's class is peft.LoraConfig, peft.LoHaConfig or peft.LoKrConfig.
        fields: what of the config says what the tensors mean.
        tensors: as `peft.set_peft_model_state_dict` takes them, in diffusers' names.
        notes: what was changed; nothing if the layers do exactly what the file's do.
    """

    peft_type: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]


def as_peft(component: str, modules: Mapping[str, Factors]) -> PeftForm:
    """Return a component as PEFT's layers.

    Raises:
        UnsupportedError: PEFT has no form for it (see `as_lora`).
    """
    peft_type, fields = ("LORA", None)
    if why_not_loha(modules) == "":
        peft_type, fields = "LOHA", _loha_fields(component, modules)
    elif (found := _lokr_fields(component, modules)) is not None:
        peft_type, fields = "LOKR", found
    notes: tuple[str, ...] = ()
    if fields is None:
        lora = as_lora(component, modules)
        modules, fields, notes = lora.modules, lora.fields, lora.notes
    tensors: dict[str, Tensor] = {}
    for name, factors in modules.items():
        tensors |= {f"{name}{end}": tensor for end, tensor in tensors_for(factors, "peft").items()}
    return PeftForm(peft_type, fields, tensors, notes)


def why_not_loha(modules: Mapping[str, Factors]) -> str:
    """Return why PEFT's LoHa layers are not what the modules are, "" if they are exactly that."""
    cores = set()
    for name, factors in modules.items():
        if not isinstance(factors, LohaFactors):
            return f"{name!r} is {factors.kind}"
        if factors.magnitude is not None:
            return f"{name!r} has DoRA, and PEFT's LoHa has not"
        if factors.w2_b.shape[0] != factors.rank:
            return f"the matrices of {name!r} have two ranks, and PEFT's LoHa has one"
        if math.prod(factors.shape[2:]) > 1:
            cores.add(factors.t1 is not None)
    return (
        "" if len(cores) < 2 else "some convolutions have cores and others have not, and PEFT has one setting for all"
    )


def _loha_fields(component: str, modules: Mapping[str, Factors]) -> dict[str, Any]:
    cores = any(getattr(factors, "t1", None) is not None for factors in modules.values())
    return {**lycoris_fields(component, modules), "use_effective_conv2d": cores}


def _lokr_fields(component: str, modules: Mapping[str, Factors]) -> dict[str, Any] | None:
    """Return LoKrConfig's fields if one config makes PEFT's layers those of all modules, else None."""
    layers = {name: factors for name, factors in modules.items() if isinstance(factors, LokrFactors)}
    if len(layers) < len(modules) or any(factors.magnitude is not None for factors in layers.values()):
        return None
    ranked = {name: _with_pefts_rank(factors) for name, factors in layers.items()}
    kernels = {
        factors.t2 is not None for factors in layers.values() if math.prod(factors.shape[2:]) > 1 and factors.w2 is None
    }
    if len(kernels) > 1:
        return None
    for factor in dict.fromkeys([-1, *(factors.first_shape[0] for factors in layers.values())]):
        for both in (False, True):
            if all(_is_pefts(layers[name], rank, factor, both) for name, (rank, _) in ranked.items()):
                ranks = {name: rank for name, (rank, _) in ranked.items()}
                alphas = {name: alpha for name, (_, alpha) in ranked.items()}
                fields = lycoris_fields(component, modules, ranks, alphas)
                return {
                    **fields,
                    "decompose_both": both,
                    "decompose_factor": factor,
                    "use_effective_conv2d": True in kernels,
                }
    return None


def _with_pefts_rank(factors: LokrFactors) -> tuple[int, float]:
    """Return the rank and alpha under which PEFT's layer has the file's scaling; with both whole any large rank will do."""
    if factors.w1 is not None and factors.w2 is not None:
        rank = max(*factors.first_shape, *factors.second_shape[:2])
        return rank, float(rank)
    return factors.rank, factors.alpha


def _is_pefts(factors: LokrFactors, rank: int, factor: int, both: bool) -> bool:
    """Return True if PEFT's LoKr (tuners/lokr/layer.py, update_layer) makes factors of these shapes."""
    from peft.tuners.lokr.layer import factorization

    out, inside = factors.shape[:2]
    (out1, out2), (in1, in2) = factorization(out, factor), factorization(inside, factor)
    if (out1, in1) != factors.first_shape or (out2, in2) != factors.second_shape[:2]:
        return False
    whole1 = not (both and rank < max(out1, in1) / 2)
    whole2 = rank >= max(out2, in2) / 2
    same_rank = factors.w1_b is None or factors.w2_b is None or factors.w1_b.shape[0] == factors.w2_b.shape[0]
    return same_rank and whole1 == (factors.w1 is not None) and whole2 == (factors.w2 is not None)
