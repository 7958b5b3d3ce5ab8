"""The fields of a LoraConfig that say what a component's tensors mean, and what given fields say of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from ..adapter_config import AdapterConfigData
from ..errors import CheckpointError, UnsupportedError
from ..naming import exact_targets, patterns_for
from .factors import Factors, LoraFactors
from .low_rank import low_rank
from .text_encoder_names import without_text_model

Value = TypeVar("Value")


@dataclass(frozen=True)
class LoraComponent:
    """One component as PEFT has it: plain LoRA layers that share one config.

    Attributes:
        modules: module -> factors without cores, all or none with a magnitude, all or none with a bias.
        fields: what of LoraConfig says what they mean.
        notes: what was changed to get there.
    """

    modules: Mapping[str, LoraFactors]
    fields: Mapping[str, Any]
    notes: tuple[str, ...]


def as_lora(component: str, modules: Mapping[str, Factors]) -> LoraComponent:
    """Return a component in PEFT's terms.

    LoHa, LoKr and Tucker cores become LoRA (`low_rank`). Where only some layers are rank-stabilised, all get plain alphas.

    Raises:
        UnsupportedError: some layers have DoRA and others have not, or a magnitude counts inputs: PEFT has no form for it.
    """
    made = {name: low_rank(factors) for name, factors in modules.items()}
    notes = describe_folded(component, modules, made)
    _check_magnitudes(component, made)
    if any(factors.bias is not None for factors in made.values()):
        made = {name: _with_bias(factors) for name, factors in made.items()}
    stabilised = {factors.rank_stabilised for factors in made.values()}
    if len(stabilised) > 1:
        made = {name: _plain(factors) for name, factors in made.items()}
        notes = (
            *notes,
            f"{component}: some layers are rank-stabilised and others are not, so all have plain alphas now",
        )
    return LoraComponent(made, _fields(component, made), notes)


def describe_folded(component: str, before: Mapping[str, Factors], after: Mapping[str, Factors]) -> tuple[str, ...]:
    """Say which layers became LoRA, and of what rank."""
    folded = [name for name, factors in before.items() if after[name] is not factors]
    if not folded:
        return ()
    kinds = sorted({"Tucker" if before[name].kind == "LoRA" else before[name].kind for name in folded})
    ranks = [f"{before[name].rank} to {after[name].rank}" for name in folded]
    return (
        f"{component}: {len(folded)} layers of {' and '.join(kinds)} are plain LoRA now, the same update to rounding in "
        f"float32; rank {max(set(ranks), key=ranks.count)} in most",
    )


def _check_magnitudes(component: str, modules: Mapping[str, LoraFactors]) -> None:
    with_dora = [name for name, factors in modules.items() if factors.magnitude is not None]
    if with_dora and len(with_dora) < len(modules):
        without = next(name for name in modules if name not in with_dora)
        raise UnsupportedError(
            f"{component}: {with_dora[0]!r} has DoRA and {without!r} has not. PEFT, and diffusers with it, has DoRA for all "
            "layers of a component or for none. Write kohya's or LyCORIS' format, or merge the adapter."
        )
    if inputs := [name for name in with_dora if modules[name].magnitude_axis != "output"]:
        raise UnsupportedError(
            f"{component}: the magnitude of {inputs[0]!r} counts inputs, which PEFT and diffusers have no form for. "
            "Write the lycoris format, or merge the adapter."
        )


def _with_bias(factors: LoraFactors) -> LoraFactors:
    return (
        factors
        if factors.bias is not None
        else replace(factors, bias=torch.zeros(factors.b.shape[0], dtype=factors.b.dtype))
    )


def _plain(factors: LoraFactors) -> LoraFactors:
    return replace(factors, alpha=factors.scaling * factors.rank, rank_stabilised=False)


def _fields(component: str, modules: Mapping[str, LoraFactors]) -> dict[str, Any]:
    first = next(iter(modules.values()))
    shared = lycoris_fields(component, modules)
    return {
        **{"lora_alpha" if name == "alpha" else name: value for name, value in shared.items()},
        "use_rslora": first.rank_stabilised,
        "use_dora": first.magnitude is not None,
        "lora_bias": first.bias is not None,
    }


def lycoris_fields(
    component: str,
    modules: Mapping[str, Factors],
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the fields that LoHaConfig and LoKrConfig share, and LoraConfig but for the name of alpha.

    Args:
        component: the pipeline's part.
        modules: module -> factors.
        ranks, alphas: module -> its own, None for those of the factors.
    """
    # Ends of names that are right whether or not the encoder's class has a text_model.
    text = component.startswith("text_encoder")
    short = {name: without_text_model(name) if text else name for name in modules}
    r = {short[name]: ranks[name] if ranks else factors.rank for name, factors in modules.items()}
    alpha = {short[name]: alphas[name] if alphas else factors.alpha for name, factors in modules.items()}
    most_r, most_alpha = _most(r), _most(alpha)
    return {
        "r": most_r,
        "alpha": _number(most_alpha),
        "rank_pattern": _patterns(r, most_r, text),
        "alpha_pattern": {key: _number(value) for key, value in _patterns(alpha, most_alpha, text).items()},
        # A regular expression would not match the longer names; of CLIP's and T5's none ends another one.
        "target_modules": sorted(r) if text else exact_targets(r),
    }


def _most(values: Mapping[str, Value]) -> Value:
    found = list(values.values())
    return max(dict.fromkeys(found), key=found.count)


def _patterns(values: Mapping[str, Value], default: Value, text: bool) -> dict[str, Value]:
    patterns: dict[str, Value] = {}
    for value in dict.fromkeys(values.values()):
        if value == default:
            continue
        names = [name for name, own in values.items() if own == value]
        # An anchor would not match names that begin with text_model.
        patterns |= {key.removeprefix("^") if text else key: value for key in patterns_for(names, values)}
    return patterns


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def with_config(modules: Mapping[str, LoraFactors], config: AdapterConfigData, where: str) -> dict[str, LoraFactors]:
    """Give layers the alphas of a config.

    Raises:
        CheckpointError: the config's ranks are not those of the tensors.
    """
    ranks, alphas, stabilised = config.ranks(modules), config.alphas(modules), bool(config.get("use_rslora"))
    for name, factors in modules.items():
        if ranks[name] != factors.rank:
            raise CheckpointError(
                f"{where}: {name[:200]!r} has rank {factors.rank}, but its config says {ranks[name]}. Config and weights "
                "are of different adapters; get the file again."
            )
    return {
        name: replace(factors, alpha=float(alphas[name]), rank_stabilised=stabilised)
        for name, factors in modules.items()
    }
