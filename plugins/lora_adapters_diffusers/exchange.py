"""Adapters between a pipeline and `lora_adapters.formats`: out of its layers as they are, and to where `restore` reads."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_adapters import formats
from lora_adapters.adapter import Adapter
from lora_adapters.adapter_file import PREFIX, inspect_adapter, peft_type_of
from lora_adapters.attach_plan import AttachPlan
from lora_adapters.backends import base_of
from lora_adapters.errors import CheckpointError, LoraAdaptersError, UnsupportedError
from lora_adapters.formats.conversion import check_max_rank, cut
from lora_adapters.formats.factors import LoraFactors
from lora_adapters.formats.families import family_in_metadata
from lora_adapters.formats.keys import factors_of, layers_of, split_key
from lora_adapters.formats.peft_fields import LoraComponent, as_lora
from lora_adapters.formats.peft_folders import component_folders, new_root, write_component
from lora_adapters.formats.portable import PortableAdapter
from lora_adapters.formats.source import is_peft_root, open_source
from lora_adapters.formats.text_encoder_names import with_text_model, without_text_model
from lora_adapters.planning import make_plan
from lora_adapters.request import AttachRequest
from lora_adapters.saving import checked_plan

from . import loading

#: Fields of a config that say what the layers compute, beside ranks and alphas.
_CARRIED = ("use_rslora", "use_dora", "lora_bias")


# ---- out ------------------------------------------------------------------------------------------------------------


def carried_layers(model: nn.Module, name: str) -> dict[str, Any]:
    """Return module name -> layer, of the layers that carry the adapter `name`."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {n: layer for n, layer in layers.items() if name in layer.lora_A or name in layer.lora_embedding_A}


def take_out(components: Mapping[str, nn.Module], name: str) -> PortableAdapter:
    """Return an adapter of a pipeline's parts, whoever put it there, in no file's form.

    Ranks are those of the tensors and alphas give the adapter's own scales, whatever weight it is set to now: a layer
    that was padded or swapped is no longer what its config says.

    Raises:
        UnsupportedError: files of diffusion models have no place for what it trained (biases of the base, whole modules,
            embeddings, grouped convolutions).
    """
    return PortableAdapter({component: _factors(component, model, name) for component, model in components.items()})


def _factors(component: str, model: Any, name: str) -> dict[str, LoraFactors]:
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    tensors = {key.removeprefix(PREFIX): value.detach() for key, value in tensors.items()}
    if strange := [key for key in tensors if split_key(key) is None]:
        raise UnsupportedError(
            f"These formats hold LoRA on linear and convolution layers only, and this adapter has {strange[0]!r}. "
            'Save it as PEFT folders: format="peft".'
        )
    layers = carried_layers(model, name)
    for module, layer in layers.items():
        if getattr(layer.get_base_layer(), "groups", 1) > 1:
            raise UnsupportedError(
                f"{module!r} is a convolution with groups, whose adapter other tools can't load. Save it as PEFT folders "
                '(format="peft"), or leave it out of targets.'
            )
    made: dict[str, LoraFactors] = {}
    for module, found in layers_of(tensors, f"Adapter {name!r}").items():
        factors, layer = factors_of(found, f"Adapter {name!r}"), layers[module]
        assert isinstance(factors, LoraFactors)
        made[with_text_model(component, module)] = replace(
            factors,
            alpha=float(_alpha_for(layer, name, factors.rank)),
            rank_stabilised=bool(layer.use_rslora.get(name)),
        )
    return made


def weight_notes(components: Mapping[str, nn.Module], name: str) -> tuple[str, ...]:
    """Say where an adapter's layers are at another scale than its own: by a weight, or swapped by stock code, alike here.

    PEFT's hot swap changes the scales and leaves ranks, alphas and config as they were.
    """
    found = []
    for component, model in components.items():
        for layer in carried_layers(model, name).values():
            root = math.sqrt if layer.use_rslora.get(name) else float
            own, now = layer.lora_alpha[name] / root(layer.r[name]), float(layer.scaling[name])
            if not math.isclose(own, now, rel_tol=1e-5):
                found.append(f"{component}: the scale is {own:g} as the adapter's alpha says, and now set to {now:g}")
                break
    remedy = (
        "a weight is not saved; what stock code swapped in (hotswap=True) has lost its alpha: load it with hotswap()"
    )
    return (*found, remedy) if found else ()


def save_folders(
    path: Path, components: Mapping[str, nn.Module], handles: Mapping[str, Adapter | None], name: str
) -> Path:
    """Write a PEFT folder for each component, all as one act: by its handle, which knows what trained beside LoRA, if any.

    Raises:
        RequestError: `path` is a file, or holds anything but components' folders. UnsupportedError: see `take_out`.
    """
    with new_root(path) as place:
        for component, model in components.items():
            if (handle := handles[component]) is not None:
                handle.save(place / component)
                continue
            taken = take_out({component: model}, name).components[component]
            write_component(place / component, fitted(model, as_lora(component, taken)), {})
    return path


def plan_as_is(model: Any, name: str) -> AttachPlan:
    """Return the plan of an adapter's layers as they are now: the ranks of their tensors, the scales without weights."""
    config = model.peft_config[name]
    exact = {}
    for module, layer in carried_layers(model, name).items():
        rank = layer.lora_B[name].weight.shape[1]
        exact[module] = (rank, _alpha_for(layer, name, rank))
    kept = {field: value for field in _CARRIED if (value := getattr(config, field))}
    request = AttachRequest.make(exact=exact, dropout=config.lora_dropout, modules_to_save=(), **kept)
    return make_plan(model, request)


def _alpha_for(layer: Any, name: str, rank: int) -> float:
    """Return the alpha that gives a layer's own scale at this rank."""
    own, alpha = layer.r[name], layer.lora_alpha[name]
    if own == rank:
        return alpha
    return alpha * math.sqrt(rank / own) if layer.use_rslora.get(name) else alpha * rank / own


# ---- in -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folders:
    """What a source holds, where everything that restores checks it in full.

    Attributes:
        paths: component -> PEFT folder.
        notes: what is not as it was in the source, and how far off.
    """

    paths: Mapping[str, Path]
    notes: tuple[str, ...] = ()


@contextmanager
def as_folders(
    components: Mapping[str, nn.Module],
    family: str,
    source: str | Path | Mapping[str, torch.Tensor],
    *,
    weight_name: str | None = None,
    revision: str | None = None,
    max_rank: int | None = None,
) -> Iterator[Folders]:
    """Give what a source holds as PEFT folders; see `LoraPipeline.load`. Temporary ones go afterwards.

    PEFT folders of LoRA are given as they are, with all that only they can hold; whatever else `formats` reads is written
    as such folders.

    Raises:
        CheckpointError: there is no such source, or it is damaged or for another pipeline. UnsupportedError: PEFT's LoRA
            has no form for it.
    """
    if max_rank is not None:
        check_max_rank(max_rank)
    if isinstance(source, (str, Path)):
        source = loading.adapter_path(str(source), weight_name, revision)
        if (
            max_rank is None
            and source.is_dir()
            and is_peft_root(source)
            and (found := _as_they_are(components, source))
        ):
            yield Folders(found)
            return
    adapter = _read(components, family, source)
    adapter = adapter if max_rank is None else cut(adapter, max_rank)
    notes = list(adapter.notes)
    with tempfile.TemporaryDirectory() as place:
        paths = {}
        for component, modules in adapter.components.items():
            lora = fitted(components[component], as_lora(component, modules))
            notes += lora.notes
            paths[component] = Path(place) / component
            write_component(paths[component], lora, {})
        yield Folders(paths, tuple(notes))


def _as_they_are(components: Mapping[str, nn.Module], root: Path) -> dict[str, Path] | None:
    """Return component -> folder, or None if one is of another method than LoRA, or names modules otherwise."""
    found: dict[str, Path] = {}
    for folder in component_folders(root):
        if peft_type_of(folder) != "LORA":
            return None
        file = inspect_adapter(folder)
        possible = [folder.name] if folder.name in components or folder != root else list(components)
        there = {c: dict(components[c].named_modules()).keys() for c in possible if c in components}
        named = [component for component, names in there.items() if names >= set(file.modules)]
        if not named:
            return None
        fitting = [component for component in named if _fits(components[component], file)]
        if len(fitting) > 1:
            raise CheckpointError(
                f"{folder} fits several parts of this pipeline ({', '.join(fitting)}). Name the folder after the one that "
                "it is for, and give that."
            )
        # Of one that does not fit `restore` says why.
        found[(fitting or named)[0]] = folder
    return found


def _fits(model: nn.Module, file: Any) -> bool:
    try:
        checked_plan(model, file)
    except LoraAdaptersError:
        return False
    return True


def _read(
    components: Mapping[str, nn.Module], family: str, source: Path | Mapping[str, torch.Tensor]
) -> PortableAdapter:
    """Read a source for a pipeline of this family, and check that it has the parts and the layers.

    Raises:
        CheckpointError: it lacks some: the adapter was made for another pipeline or model.
    """
    opened = open_source(source)
    said = family_in_metadata(opened.metadata)
    differ = bool(family) and said not in ("", family)
    hint = f" By its header it is for {said}, and this pipeline is {family}." if differ else ""
    try:
        adapter = formats.read(source, family=family or None)
    except (CheckpointError, UnsupportedError) as error:
        more = hint or ("" if family else " pipe.load_lora_weights may know it; what it loads is managed here too.")
        raise type(error)(f"{error}{more}") from error
    if lacking := [component for component in adapter.components if component not in components]:
        raise CheckpointError(
            f"{opened.origin} adapts the {lacking[0]}, and of this pipeline {', '.join(components)} can carry adapters: it "
            f"was made for another pipeline.{hint}"
        )
    for component, modules in adapter.components.items():
        there = dict(components[component].named_modules()).keys()
        if strange := sorted(name for name in modules if _own_name(name, there) not in there):
            raise CheckpointError(
                f"{opened.origin} was made for another model: {len(strange)} of the {len(modules)} layers it adapts in the "
                f"{component} are not in this one, first {strange[0]!r}.{hint}"
            )
    return adapter


def fitted(model: nn.Module, lora: LoraComponent) -> LoraComponent:
    """Return a component with the names and the kernels that a model has.

    CLIPTextModel's layers have a level `text_model` in some versions of transformers; a linear layer's factors may be
    stored as those of a 1x1 convolution, or the other way round: the same numbers.
    """
    there = dict(model.named_modules())
    made = {}
    for name, factors in lora.modules.items():
        own = _own_name(name, there.keys())
        made[own] = _with_kernel(factors, tuple(getattr(base_of(there[own]), "kernel_size", ())))
    return replace(lora, modules=made)


def _own_name(name: str, there: Any) -> str:
    return name if name in there else without_text_model(name)


def _with_kernel(factors: LoraFactors, kernel: tuple[int, ...]) -> LoraFactors:
    a, b = factors.a, factors.b
    flat = all(side == 1 for side in a.shape[2:])
    if tuple(a.shape[2:]) == kernel or not flat or a[0].numel() % math.prod(kernel):
        return factors  # Where it does not fit, `restore` says so.
    a, b = a.reshape(a.shape[0], -1, *kernel), b.reshape(*b.shape[:2], *[1] * len(kernel))
    return replace(factors, a=a, b=b)
