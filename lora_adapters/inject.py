"""Carries out a plan: builds the layers, gives the model its PeftModel, proves the result, or takes everything back.

The one module that touches PEFT's private parts; tests/test_canaries.py has a test for each of them.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from . import batch_norm
from .attach_plan import AttachPlan, PlannedLayer
from .backends import base_of, foreign_tuner
from .direct_reads import has_fused_layers, keep_called
from .errors import LoraAdaptersWarning, RequestError, StateError, UnsupportedError, VerificationError
from .garbage import collection_paused
from .hooks.manager import load_object
from .layers import BUILTIN_LAYERS
from .layers.engine import EngineLayer, Factors
from .layers.fused import FusedForward
from .layers.groups import join_siblings
from .layers.optimized import stock_class
from .layers.part_factors import mask_of
from .layers.routes import Route, route
from .naming import patterns_for, target_modules_for
from .sharing import places_of, put
from .snapshot import Changes, Snapshot
from .starting_values import fill_factors
from .weights import guard_cpu_repacking, mark_quantized, quantize_modules
from .wrappers import unnest

if TYPE_CHECKING:
    from collections.abc import Callable

try:
    # A target_modules value that PEFT's injection takes as "inject nothing": it then does its housekeeping
    # (modules_to_save, biases, freezing) around the layers we placed.
    from peft.utils.constants import DUMMY_TARGET_MODULES
except ImportError:  # pragma: no cover - the canary test fails first
    DUMMY_TARGET_MODULES = None


def apply(
    model: nn.Module,
    plan: AttachPlan,
    peft_model: PeftModel | None = None,
    *,
    load: Callable[[PeftModel], None] | None = None,
) -> tuple[PeftModel, Changes]:
    """Attach the plan's adapter to `model` in place.

    Args:
        model: the base model (not its PeftModel).
        plan: made for this model.
        peft_model: the PeftModel around `model` if it already carries LoRA adapters.
        load: fills in the adapter's values (from a checkpoint); None initialises them.

    A base that the user loaded in 4 bits also gets `guard_cpu_repacking`, for good: every layer, adapted or not.

    Returns:
        The PeftModel around `model`, and the changes that take the adapter off again.

    Raises:
        Whatever goes wrong, after the model has been set back as it was.
    """
    _refuse_foreign(model)
    _refuse_merged(model, plan)
    guard_cpu_repacking(model)
    with collection_paused():  # thousands of new modules would make it walk everything again and again
        return _apply(model, plan, peft_model, load)


def _apply(
    model: nn.Module, plan: AttachPlan, peft_model: PeftModel | None, load: Callable[[PeftModel], None] | None
) -> tuple[PeftModel, Changes]:
    snapshot = Snapshot(model, _values_at_risk(model, plan))
    initialise = load is None
    fused = has_fused_layers(model)
    try:
        if DUMMY_TARGET_MODULES is None and any(layer.parts for layer in plan.layers):
            raise UnsupportedError(
                "This version of peft lacks DUMMY_TARGET_MODULES, without which parts can't be adapted."
            )
        if plan.engine == "direct" and DUMMY_TARGET_MODULES is None:
            warn("This version of peft lacks DUMMY_TARGET_MODULES, so PEFT's own injection builds the layers.")
        if plan.engine == "direct" and DUMMY_TARGET_MODULES is not None:
            result = _inject_directly(model, plan, peft_model, initialise)
        else:
            result = _inject_through_peft(model, plan, peft_model, initialise)
        unnest(model)
        batch_norm.prepare_copies(model, plan.request.adapter_name, plan.norms, plan.request.norm == "affine")
        _choose_forwards(model, plan)
        if fused:
            keep_called(model)
        join_siblings(model)
        if load is not None:
            load(result)
        verify(model, plan, result, initialise)
    except BaseException:
        snapshot.changes().revert()
        if peft_model is not None:
            peft_model.peft_config.pop(plan.request.adapter_name, None)
        raise
    changes = snapshot.changes()
    # Not one of the changes to take back: detaching leaves the model in the mode it is in then.
    batch_norm.freeze(model)
    return result, changes


def quantize(model: nn.Module, plan: AttachPlan, progress: Callable[[int, int, str], None] | None = None) -> None:
    """Quantize what the plan says, in place, layer by layer. Each dense weight is freed, so it can't be undone."""
    if not plan.quantize:
        return
    quantizers = {name: plan._quantizers[name] for name in plan.quantize}
    compute_dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    quantize_modules(model, quantizers, compute_dtype, progress=progress)
    mark_quantized(model, next(iter(quantizers.values())))


def planned_on_meta(model: nn.Module, plan: AttachPlan) -> nn.Module:
    """Return a meta-device twin of `model` with the plan carried out on it. `model` is not touched."""
    # A start that reads the base's weights can't be computed without them, and takes the same memory.
    fields = {name: value for name, value in plan.request.peft_fields.items() if name != "init_lora_weights"}
    plan = dataclasses.replace(plan, request=dataclasses.replace(plan.request, peft_fields=fields))
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        # A packed weight stays as it is: it is small, and only its own class can move it.
        plain = type(tensor) in (nn.Parameter, torch.Tensor)
        memo[id(tensor)] = tensor if not plain else _empty_like(tensor)
    twin = copy.deepcopy(model, memo)
    quantize(twin, plan)
    _refuse_foreign(twin)
    # Not `apply`: what it mends in 4-bit layers it would mend in the packed weights that the twin shares.
    return _apply(twin, plan, None, None)[0]


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _refuse_foreign(model: nn.Module) -> None:
    methods = {method for cls in {type(module) for module in model.modules()} if (method := foreign_tuner(cls))}
    if methods:
        raise UnsupportedError(
            f"The model carries {', '.join(sorted(methods))} adapters. PEFT freezes and saves one tuner's layers at a "
            "time, so LoRA beside them would silently stop their training. Unload them first, or use prompt or prefix "
            "tuning, which LoRA can stand beside."
        )


def _refuse_merged(model: nn.Module, plan: AttachPlan) -> None:
    """Raise if PEFT's own code has merged a layer: ours could not undo that, since it keeps the old base aside."""
    for planned in plan.layers:
        layer = model.get_submodule(planned.name)
        if isinstance(layer, LoraLayer) and layer.merged and not isinstance(layer, EngineLayer):
            raise StateError(
                f"{planned.name!r} has {', '.join(map(repr, layer.merged_adapters))} merged into its base. Unmerge first "
                "(unmerge_adapter(), or a pipeline's unfuse_lora()), then attach."
            )


def _choose_forwards(model: nn.Module, plan: AttachPlan) -> None:
    """Switch the fast forwards of the plan's layers on or off. The last adapter that comes to a layer decides."""
    for planned in plan.layers:
        layer = model.get_submodule(planned.name)
        vars(layer).pop("fused", None)
        if plan.request.fused is False and isinstance(layer, FusedForward):
            layer.fused = False


def _values_at_risk(model: nn.Module, plan: AttachPlan) -> list[nn.Parameter]:
    """Return base parameters that attaching or training overwrites, and that detaching must bring back."""
    bias = plan.request.peft_fields.get("bias", "none")
    risk = [p for n, p in model.named_parameters() if n == "bias" or n.endswith(".bias")] if bias != "none" else []
    init = plan.request.peft_fields.get("init_lora_weights", True)
    if isinstance(init, str) and init != "gaussian":
        # PiSSA, OLoRA, LoftQ and others take part of the base weight into the adapter.
        risk += [p for layer in plan.layers for p in base_of(model.get_submodule(layer.name)).parameters()]
    return risk


# ---- the direct way -------------------------------------------------------------------------------------------------


def _inject_directly(model: nn.Module, plan: AttachPlan, peft_model: PeftModel | None, initialise: bool) -> PeftModel:
    config = build_config(model, plan)
    name = plan.request.adapter_name
    classes = {spec: load_object(spec) for spec in {layer.layer for layer in plan.layers}}
    real = {field: getattr(config, field) for field in ("target_modules", "rank_pattern", "alpha_pattern")}
    config.target_modules, config.rank_pattern, config.alpha_pattern = DUMMY_TARGET_MODULES, {}, {}
    # PEFT freezes the base only while no layer carries an adapter, so its housekeeping comes before our layers.
    first = peft_model is None and not adapter_names(model)
    peft_model = _wrap(model, config, plan) if peft_model is None else _add(peft_model, config, name)
    for field, value in real.items():
        setattr(config, field, value)
    places = places_of(model)
    for planned in plan.layers:
        module = model.get_submodule(planned.name)
        if isinstance(module, LoraLayer):
            layer = adopt(module)
        else:
            layer = classes[planned.layer].wrap(module)
            put(places[id(module)], layer)
        base = base_of(layer)
        layer.add_factors(name, _factors(base, planned, plan, initialise))
        if config.bias == "lora_only" and getattr(base, "bias", None) is not None:
            base.bias.requires_grad_(True)
    tuner: Any = peft_model.base_model
    tuner.targeted_module_names = [layer.name for layer in plan.layers]
    if not first or config.inference_mode:
        peft_model.set_adapter(name, inference_mode=config.inference_mode)
    return peft_model


def _wrap(model: nn.Module, config: LoraConfig, plan: AttachPlan) -> PeftModel:
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(plan.task_type or "", PeftModel)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*second time.*")
        # PEFT asks transformers by an old name; there is nothing the user could do about it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return cls(model, config, adapter_name=plan.request.adapter_name, autocast_adapter_dtype=False)


def _add(peft_model: PeftModel, config: LoraConfig, name: str, cast: bool = False) -> PeftModel:
    # Not the method of a class for a task: that one adds the head to what the plan says is trained whole.
    PeftModel.add_adapter(peft_model, name, config, autocast_adapter_dtype=cast)
    return peft_model


def adopt(layer: LoraLayer) -> EngineLayer:
    """Turn a stock PEFT layer into ours in place; state_dict keys and behaviour stay."""
    if isinstance(layer, EngineLayer):
        return layer
    ours = _our_class(type(layer))
    if ours is None:
        raise UnsupportedError(f"PEFT's {type(layer).__name__} has no counterpart here, so it can't take an adapter.")
    layer.__class__ = ours
    return layer  # type: ignore[return-value]


def _our_class(peft_class: type) -> type | None:
    """Return our subclass of a stock PEFT layer class, or of one that `optimize` gave a layer instead; or None."""
    peft_class = stock_class(peft_class) or peft_class
    for spec in BUILTIN_LAYERS:
        if not spec.layer.endswith(f":{peft_class.__name__}"):
            continue
        ours = load_object(spec.layer)
        if peft_class in ours.__bases__:
            return ours
    return None


def _factors(base: nn.Module, planned: PlannedLayer, plan: AttachPlan, initialise: bool) -> Factors:
    request = plan.request
    weight: Any = base.weight
    dtype = request.dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)
    rank, (out, *rest) = planned.rank, planned.shape
    embedding = planned.kind == "embedding"
    shape_a = (rank, out) if embedding else (rank, *rest)
    shape_b = (rest[0], rank) if embedding else (out, rank, *[1] * (len(rest) - 1))
    device = weight.device
    bias = torch.zeros(out, dtype=dtype, device=device) if request.peft_fields.get("lora_bias") else None
    a = torch.empty(shape_a, dtype=dtype, device=device)
    b = torch.zeros(shape_b, dtype=dtype, device=device)
    mask = mask_of(planned.parts, out, device) if planned.parts else None
    if initialise and device.type != "meta":
        fill_factors(a, b, planned, request.seed, request.peft_fields.get("init_lora_weights", True))
    return Factors(a, b, rank, planned.alpha, planned.scaling, request.dropout, request.rslora, bias, mask)


# ---- PEFT's way, for its special initialisations and variants ----------------------------------------------------


def _inject_through_peft(
    model: nn.Module, plan: AttachPlan, peft_model: PeftModel | None, initialise: bool
) -> PeftModel:
    config = build_config(model, plan)
    name = plan.request.adapter_name
    places = places_of(model)
    before = [model.get_submodule(planned.name) for planned in plan.layers]
    # PEFT recognises a quantized base by this flag alone; without it a 4-bit layer would be taken for a dense one.
    if peft_model is None:
        peft_model = get_peft_model(model, config, adapter_name=name)  # type: ignore[arg-type,assignment]
    else:
        peft_model = _add(peft_model, config, name, cast=True)
    assert peft_model is not None
    plain = config.init_lora_weights in (True, False, "gaussian")
    for planned, old in zip(plan.layers, before, strict=True):
        layer = model.get_submodule(planned.name)
        if layer is not old:
            put(places[id(old)], layer)  # PEFT replaces a module in the first place only
        if _our_class(type(layer)) is not None:
            layer = adopt(layer)  # type: ignore[arg-type]
        if plain and initialise and isinstance(layer, EngineLayer):
            a, b = layer.factor_parameters(name)
            fill_factors(a.data, b.data, planned, plan.request.seed, config.init_lora_weights)  # type: ignore[arg-type]
    peft_model.set_adapter(name)
    return peft_model


def build_config(model: nn.Module, plan: AttachPlan) -> LoraConfig:
    """Return the LoraConfig with which stock PEFT adapts exactly the plan's layers, with their ranks and alphas."""
    request = plan.request
    rank = Counter(layer.rank for layer in plan.layers).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in plan.layers).most_common(1)[0][0]
    names = [layer.name for layer in plan.layers]
    universe = plain_names(model)
    passed = {
        k: v
        for k, v in request.peft_fields.items()
        if k not in ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save", "task_type")
    }
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=request.dropout,
        target_modules=target_modules_for(names, universe),
        rank_pattern=_pattern(plan.layers, "rank", rank, names),
        alpha_pattern=_pattern(plan.layers, "alpha", alpha, names),
        modules_to_save=[*plan.trained, *plan.norms] or None,
        task_type=plan.task_type,  # type: ignore[arg-type]
        fan_in_fan_out=passed.pop("fan_in_fan_out", _only_transposed(model, names)),
        **passed,
    )


def _only_transposed(model: nn.Module, names: Iterable[str]) -> bool:
    """Return True if every adapted linear layer is transformers' Conv1D (PEFT then expects fan_in_fan_out=True)."""
    return all(type(base_of(model.get_submodule(name))).__name__ == "Conv1D" for name in names)


def plain_names(model: nn.Module) -> list[str]:
    """Return module names as they are without adapters: the inside of PEFT layers left out."""
    names: list[str] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        inside = ()
        if isinstance(module, LoraLayer) or hasattr(module, "modules_to_save"):
            inside = (name + ".",)
        names.append(name)
    return names


def _pattern(layers: Iterable[PlannedLayer], field: str, default: float, universe: list[str]) -> dict[str, Any]:
    by_value: dict[Any, list[str]] = {}
    for layer in layers:
        if getattr(layer, field) != default:
            by_value.setdefault(getattr(layer, field), []).append(layer.name)
    return {key: value for value, names in by_value.items() for key in patterns_for(names, universe)}


# ---- proof -------------------------------------------------------------------------------------------------------


def verify(model: nn.Module, plan: AttachPlan, peft_model: PeftModel, initialised: bool = True) -> None:
    """Check that the model is as planned.

    Raises:
        VerificationError: a planned layer was not replaced, another one was, the trainable values are not those
            planned, or the untrained adapter already changes the output.
    """
    name = plan.request.adapter_name
    layers: dict[str, Any] = {layer.name: model.get_submodule(layer.name) for layer in plan.layers}
    lacking = [n for n, layer in layers.items() if not isinstance(layer, LoraLayer) or name not in _names(layer)]
    modules = list(model.modules())
    carrying = {id(m) for m in modules if isinstance(m, LoraLayer) and name in _names(m)}
    if lacking or carrying != {id(layer) for layer in layers.values()}:
        what = f"{lacking[0]!r} was not adapted" if lacking else f"{len(carrying)} layers carry it, not {len(layers)}"
        raise VerificationError(f"The model is not as planned: {what}.")
    if plan.engine == "direct" and not plan.request.peft_fields.get("inference_mode"):
        parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad}
        trainable = sum(p.numel() for p in parameters.values())
        if trainable != plan.trainable_parameters:
            raise VerificationError(f"{trainable:,} values are trainable, planned were {plan.trainable_parameters:,}.")
    plain = plan.request.peft_fields.get("init_lora_weights", True) in (True, "gaussian")
    if initialised and plain:
        for layer_name, layer in layers.items():
            values = layer.lora_embedding_A[name] if name in layer.lora_embedding_A else layer.lora_B[name].weight
            if values.device.type != "meta" and torch.count_nonzero(values.detach()):
                raise VerificationError(f"The new adapter of {layer_name!r} is not neutral.")


def _names(layer: LoraLayer) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}


def adapter_names(model: nn.Module) -> set[str]:
    """Return the names of all LoRA adapters on a model."""
    return {name for module in model.modules() if isinstance(module, LoraLayer) for name in _names(module)}


def unwrap_empty(model: nn.Module) -> None:
    """Put the base module back wherever no adapter is left."""
    places = places_of(model)
    empty = [m for m in model.modules() if isinstance(m, LoraLayer) and not (m.lora_A or m.lora_embedding_A)]
    for layer in empty:
        put(places[id(layer)], layer.get_base_layer())


def check_free_name(model: nn.Module, name: str) -> None:
    """Raise RequestError if the model already carries an adapter called `name`."""
    taken = adapter_names(model)
    if name in taken:
        raise RequestError(
            f"The model already carries an adapter named {name!r}. Give the new one another adapter_name, or detach "
            f"the old one first."
        )


def routes(model: nn.Module, plan: AttachPlan) -> Mapping[str, Route]:
    """Return module name -> the way that each of the plan's layers takes now, with the reason."""
    found = {}
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        if isinstance(module, FusedForward):
            found[layer.name] = route(module)
        else:
            found[layer.name] = Route("stock", f"there is no faster forward for PEFT's {type(module).__name__}")
    return found


def warn(message: str) -> None:
    """Tell the user something that does not stop the run."""
    warnings.warn(message, LoraAdaptersWarning, stacklevel=3)
