"""AttachRequest -> AttachPlan. Nothing is changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from . import batch_norm
from .attach_plan import AttachPlan, PlannedLayer, SkippedLayer, adapter_parameters
from .backends import backend_for, base_of, classify, foreign_tuner, unwrap
from .errors import NoTargetError, RequestError, UnsupportedError
from .hooks.manager import plugins
from .hooks.specs import LayerSpec
from .layers import BUILTIN_LAYERS, EFFECTIVE_LAYERS
from .layers.probe import multiplies_its_input
from .layers.routes import runs_own_forward
from .plan_edits import edited
from .projection_parts import check_rows, row_count, smaller
from .quantized import assign_quantizers, leave_read_dense
from .request import ENGINE_FIELDS, AttachRequest, check_alpha, check_rank
from .selection import Choice, select
from .sharing import held_twice, other_names, tied_names
from .targets import Classification, ModelInfo, candidates
from .trained import count_trained, inside, modules_meant, refuse_shared, task_type_without_head, trained_names
from .weights.conv4bit import Conv4bit
from .weights.dense import is_transposed

if TYPE_CHECKING:
    from torch import nn

    from .weights import Quantizer


def make_plan(model: nn.Module, request: AttachRequest) -> AttachPlan:
    """Return the plan for a request. Works on a meta-device model; changes nothing.

    Raises:
        RequestError, NoTargetError: the request can't be met; the message says what to ask for instead.
    """
    base = unwrap(model)
    backend, notes = backend_for(base)
    info = ModelInfo(backend.name, backend.family(base), candidates(base), base)
    shared = _Shared.of(base)
    classes = classify(backend, info, request)
    trained = request.modules_to_save
    if trained is None:
        trained = backend.heads_to_train(base)
    whole = trained_names(base, trained)
    refuse_shared(whole, base)
    wanted = request.peft_fields.get("task_type") or backend.task_type(base)
    norms, norm_notes = _norms(base, whole, request)
    task_type, task_notes = task_type_without_head(base, whole, wanted, request)
    chosen = select(request, [n for n in info.modules if not inside(n, whole)], classes, shared.other_names)
    quantizers = assign_quantizers(info, classes, request, whole, backend, shared.tied)
    layers, skipped, specs = [], [], _LayerSpecs()
    for name, module in info.modules.items():
        role = classes.roles.get(name, "other")
        if name in chosen:
            layer = _plan_layer(name, module, chosen[name], request, quantizers, classes, specs, shared.tied)
            (layers if isinstance(layer, PlannedLayer) else skipped).append(layer)
        else:
            reason = "trained whole" if inside(name, whole) else classes.never.get(name, "not in targets")
            skipped.append(SkippedLayer(name, role, reason))
    if not layers:
        raise NoTargetError(f"None of the {len(chosen)} chosen layers can be adapted: {skipped[0].reason}.")
    dense_notes = leave_read_dense(quantizers, classes, {layer.name for layer in layers})
    plan = AttachPlan(
        backend=backend.name,
        family=info.family,
        request=request,
        layers=tuple(layers),
        skipped=tuple(skipped),
        quantize={name: quantizer.name for name, quantizer in quantizers.items()},
        trained=trained,
        task_type=task_type,
        total_parameters=_base_values(base),
        trained_parameters=count_trained(
            base, (*whole, *norms) if request.norm == "affine" else whole, request, layers
        ),
        notes=(
            *notes,
            *classes.notes,
            *task_notes,
            *dense_notes,
            *_reading_notes(layers),
            *shared.notes(base, layers, request),
            *_rank_notes(layers, chosen),
            *norm_notes,
        ),
        norms=norms,
        _model=base,
        _quantizers=quantizers,
    )
    return edited(plan)


def _norms(base: nn.Module, whole: tuple[str, ...], request: AttachRequest) -> tuple[tuple[str, ...], Iterator[str]]:
    """Return the BatchNorms that get copies of their own for the adapter, and notes about BatchNorm."""
    names = tuple(name for name in batch_norm.batch_norms(base) if not inside(name, whole))
    if request.norm != "eval":
        meant = {found: module for name in names for found, module in modules_meant(base, name).items()}
        batch_norm.check_separable(base, names, meant)
    return names if request.norm != "eval" else (), filter(None, [batch_norm.note(request.norm, len(names))])


def _rank_notes(layers: list[PlannedLayer], chosen: Mapping[str, Choice]) -> Iterator[str]:
    """Yield what became of the ranks that were asked for."""
    if smaller := [layer.name for layer in layers if layer.rank < chosen[layer.name].rank]:
        yield (
            f"{len(smaller)} layers got a smaller rank than asked for (first {smaller[0]!r}), so that no adapter is larger "
            "than its layer. Their scale is the one asked for."
        )
    if divided := [layer for layer in layers if layer.parts]:
        zeros = sum(
            layer.shape[0] * layer.rank - sum(p.rank * row_count(p.rows) for p in layer.parts) for layer in divided
        )
        yield (
            f"{len(divided)} layers are adapted in parts, each with ranks of its own: lora_B is zero in all other rows and "
            f"stays so. {zeros:,} of the trainable values are such zeros."
        )


@dataclass(frozen=True)
class _Shared:
    """What the model shares: see `sharing`."""

    other_names: Mapping[str, str]
    tied: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> _Shared:
        """Look a model through. Names are those without adapters."""
        tied = {_without_adapter(model, name): reason for name, reason in tied_names(model).items()}
        return cls(other_names(model), tied)

    def notes(self, model: nn.Module, layers: list[PlannedLayer], request: AttachRequest) -> Iterator[str]:
        """Yield what follows from it for these layers."""
        if self.other_names and (twice := held_twice(model, [layer.name for layer in layers])):
            yield (
                f"{twice[0]!r} is one module in several places ({len(twice)} such layers): one adapter serves all of "
                "them. Stock PEFT adapts it in the first place only, so restore what you save with lora_adapters."
            )
        if tied := [layer.name for layer in layers if layer.name in self.tied]:
            yield (
                f"{len(tied)} adapted layers share their weight with another module (first {tied[0]!r}): each has an "
                "adapter of its own, and merging gives each a weight of its own, which takes more memory. (Stock PEFT "
                "would merge them all into the one weight.)"
            )
        if self.tied and request.quantization is not None:
            yield f"{len(self.tied)} modules share their weight with another one and stay as they are, dense."


def _without_adapter(model: nn.Module, name: str) -> str:
    """Return the name that a module has without adapters. (A model may call a module of its own `base_layer`.)"""
    owner, _, last = name.rpartition(".")
    wrapped = last == "base_layer" and hasattr(model.get_submodule(owner), "get_base_layer")
    return owner if wrapped else name


class _LayerSpecs:
    """Finds the adapter layer of a base module: the most specific class first."""

    def __init__(self) -> None:
        # Earlier ones win: plugins by priority, then our own.
        self._by_base = {spec.base: spec for spec in reversed([*plugins().layers(), *BUILTIN_LAYERS])}
        self._known: dict[type, LayerSpec | None] = {}

    def of(self, module: nn.Module) -> LayerSpec | None:
        cls = type(module)
        if cls not in self._known:
            names = (f"{c.__module__}:{c.__qualname__}" for c in cls.__mro__)
            self._known[cls] = next((self._by_base[n] for n in names if n in self._by_base), None)
        return self._known[cls]


def _special_fields(request: AttachRequest) -> list[str]:
    """Return the fields that only PEFT's own injection carries out."""
    special = [name for name in request.peft_fields if name not in ENGINE_FIELDS]
    init = request.peft_fields.get("init_lora_weights", True)
    if not (isinstance(init, bool) or init == "gaussian"):
        special.append("init_lora_weights")
    from peft import LoraConfig

    default = LoraConfig()
    return [n for n in special if request.peft_fields[n] != getattr(default, n)]


def _changes_base(request: AttachRequest) -> str:
    """Return the initialisation that takes part of the base weight into the adapter (PiSSA and its like), or ""."""
    init = request.peft_fields.get("init_lora_weights", True)
    return "" if isinstance(init, bool) or init in ("gaussian", "orthogonal", "eva", "mica") else str(init)


def _plan_layer(
    name: str,
    module: nn.Module,
    choice: Choice,
    request: AttachRequest,
    quantizers: Mapping[str, Quantizer],
    classes: Classification,
    specs: _LayerSpecs,
    tied: Mapping[str, str],
) -> PlannedLayer | SkippedLayer:
    from .weights import store_for

    role = choice.role

    def refuse(reason: str) -> SkippedLayer:
        if choice.named:
            raise UnsupportedError(f"{name!r} can't be adapted: {reason}")
        return SkippedLayer(name, role, reason)

    if name in classes.never:
        return refuse(classes.never[name])
    if name in tied and (init := _changes_base(request)):
        return refuse(f"{tied[name]}, which init_lora_weights={init!r} would change for both")
    base = base_of(module)
    foreign = foreign_tuner(type(module))
    if foreign:
        return refuse(f"it already carries a {foreign} adapter; LoRA on top of it is not supported")
    store = store_for(base)
    quantizer = quantizers.get(name)
    spec = specs.of(base if quantizer is None else quantizer.quantize(_meta_like(base), torch.float32))
    if store is None or spec is None:
        return refuse(f"no adapter layer for class {type(base).__module__}.{type(base).__qualname__}")
    layer, reads = spec.layer, classes.reads.get(name, "")
    if reads or (runs_own_forward(base) and (store.format == "dense" or isinstance(base, Conv4bit))):
        layer = EFFECTIVE_LAYERS.get(spec.layer, "")
        if reason := _why_not_effective(module, reads, layer, request):
            return refuse(reason)
    shape = tuple(store.shape)
    if special := choice.parts and _not_in_parts(request):
        return refuse(f"in parts it can't have {special}: ask for the whole layer, or leave that out")
    if classes.bounded and not choice.named:
        choice = bounded(choice, shape, request)
        if choice.rank < 1:
            return refuse(f"an adapter of rank 1 would be larger than the layer itself, {' x '.join(map(str, shape))}")
    check_rows(name, choice.parts, shape)
    if not choice.parts and min(shape[0], math.prod(shape[1:])) < choice.rank:
        raise RequestError(
            f"rank {choice.rank} is larger than layer {name!r} with weight {shape}: its rank is at most "
            f"{min(shape[0], math.prod(shape[1:]))}. Ask for a smaller rank, or give this layer its own: "
            f"targets={{..., {name!r}: {min(shape[0], math.prod(shape[1:]))}}}."
        )
    check_rank(choice.rank, f"rank of {name}")
    check_alpha(choice.alpha, f"alpha of {name}")
    return PlannedLayer(
        name=name,
        role=role,
        kind=spec.kind,
        shape=shape,
        rank=choice.rank,
        alpha=choice.alpha,
        scaling=request.scaling(choice.rank, choice.alpha),
        format=store.format if quantizer is None else quantizer.name,
        weight_bytes=store.nbytes if quantizer is None else quantizer.nbytes(store.shape),
        parameters=adapter_parameters(spec.kind, shape, choice.rank, bool(request.peft_fields.get("lora_bias"))),
        layer=layer,
        engine="peft" if _special_fields(request) else "direct",
        read_by=reads,
        parts=choice.parts,
    )


def _reading_notes(layers: list[PlannedLayer]) -> list[str]:
    read = [layer for layer in layers if layer.read_by]
    if not read:
        return []
    return [
        f"{read[0].read_by} reads the weight of {read[0].name!r} without calling it ({len(read)} such layers): it gets "
        "the weight with the adapter in it. Stock PEFT's adapter would do nothing there."
    ]


def _why_not_effective(module: nn.Module, reads: str, layer: str, request: AttachRequest) -> str:
    """Return "" or why a layer whose weight others read, or whose class has a forward of its own, can't be adapted."""
    base = base_of(module)
    name = type(base).__name__
    what = f"{reads} reads its weight without calling it" if reads else f"{name} has a forward of its own"
    if not layer or is_transposed(base):
        return f"{what}, and there is no adapter layer for {name} that such code would notice"
    if module is not base and not getattr(module, "effective", False):
        return f"{what}, which the PEFT layer around it doesn't know: detach that adapter first"
    if fields := _special_fields(request):
        return f"{what}, which PEFT's own injection, needed for {fields[0]}, doesn't know"
    if request.peft_fields.get("lora_bias"):
        return f"{what}, and would not notice the bias of lora_B (lora_bias=True)"
    if request.dropout and runs_own_forward(base) and not multiplies_its_input(base):
        return (
            f"{name} computes with its weight before it multiplies the input, so inputs of the adapter can't be dropped "
            "there: use dropout=0.0, or leave the layer out (exclude=[...])"
        )
    return ""


def bounded(choice: Choice, shape: tuple[int, ...], request: AttachRequest) -> Choice:
    """Return the choice with no larger rank than makes A and B as large as the weight, at the scale that was asked for.

    r (out + in) <= out * in, with in = in / groups * prod(kernel) for a convolution; parts count their own rows. A rank of
    0 says that no rank is small enough.
    """
    width = math.prod(shape[1:])
    parts = smaller(choice.parts, width, _largest_rank)
    rank = sum(part.rank for part in parts) if choice.parts else min(choice.rank, _largest_rank(shape[0], width))
    if rank in (0, choice.rank):
        return replace(choice, rank=rank, parts=parts)
    share = rank / choice.rank
    alpha = choice.alpha * (math.sqrt(share) if request.rslora else share)
    # An alpha that was equal to the rank stays so, and a whole number.
    return replace(choice, rank=rank, alpha=rank if alpha == rank else alpha, parts=parts)


def _largest_rank(out: int, width: int) -> int:
    return out * width // (out + width)


def _not_in_parts(request: AttachRequest) -> str:
    """Return what was asked that a layer adapted in parts can't have, "" if nothing."""
    special = _special_fields(request)
    special += [name for name in ("lora_bias",) if request.peft_fields.get(name)]
    return " or ".join(f"{name}={request.peft_fields[name]!r}" for name in special)


def _meta_like(module: nn.Module) -> nn.Module:
    """Return a shallow copy of a dense module with its parameters on the meta device."""
    twin = copy.copy(module)
    twin._parameters = {
        n: None if p is None else torch.nn.Parameter(p.detach().to("meta"), requires_grad=False)
        for n, p in module._parameters.items()
    }
    return twin


def _base_values(model: nn.Module) -> int:
    """Return the number of logical values of the base: weights in 4 bits are packed, two values to a byte."""
    convolutions = {id(m.weight): m.dense_shape for m in model.modules() if isinstance(m, Conv4bit)}
    found = 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        state = getattr(parameter, "quant_state", None)  # of bitsandbytes
        shape = convolutions.get(id(parameter), parameter.shape) if state is None else state.shape
        found += math.prod(shape)
    return found
