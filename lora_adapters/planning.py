"""AttachRequest -> AttachPlan: pure data about what attaching will do, every skip explained. Nothing is changed."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from .errors import LoraAdaptersWarning, NoTargetError, PluginError, RequestError, UnsupportedError
from .hooks.manager import load_object, plugins, require
from .hooks.specs import LayerSpec, PlanEdit
from .layers import BUILTIN_LAYERS
from .request import ENGINE_FIELDS, AttachRequest, check_alpha, check_pattern, check_rank
from .selection import Choice, select
from .sharing import held_twice, other_names, places_of, tied_names
from .targets import Backend, Classification, ModelInfo, candidates, expand

if TYPE_CHECKING:
    from torch import nn

    from .memory import StepMemory
    from .weights import Quantizer

#: Roles that `quantization="nf4"` covers when nothing finer is asked: heads, embeddings and routers stay dense.
QUANTIZED_ROLES = ("q", "k", "v", "o", "qkv", "kv", "mlp", "other")


@dataclass(frozen=True)
class PlannedLayer:
    """One module that will carry the adapter.

    Attributes:
        name: dotted module name.
        role: see `lora_adapters.hooks.specs.ROLES`.
        kind: "linear", "conv1d", "conv2d" or "embedding".
        shape: logical shape of the base weight.
        rank, alpha, scaling: of the adapter here; scaling is the factor of B @ A.
        format: how the base weight will be stored: "dense", "nf4", ...
        weight_bytes: bytes the base weight will take.
        parameters: values the adapter adds here.
        layer: "package.module:Class" of the adapter layer.
        engine: "direct" if this package builds the layer, "peft" if PEFT's own injection does.
    """

    name: str
    role: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    alpha: float
    scaling: float
    format: str
    weight_bytes: int
    parameters: int
    layer: str
    engine: str = "direct"


@dataclass(frozen=True)
class SkippedLayer:
    """A module that could carry an adapter and will not, with the reason."""

    name: str
    role: str
    reason: str


@dataclass(frozen=True)
class AttachPlan:
    """What `attach` will do. Printing it gives a table.

    Attributes:
        backend: name of the backend that served the model.
        family: the model's type.
        request: what was asked.
        layers: what will be adapted.
        skipped: what could be adapted and will not.
        quantize: module name -> format, of every base module that will be quantized (adapted or not).
        trained: modules that will be trained and saved whole.
        task_type: PEFT's task type or None.
        total_parameters: values of the whole base model.
        trained_parameters: values of `trained` and of trained biases.
        notes: things worth knowing.
    """

    backend: str
    family: str
    request: AttachRequest
    layers: tuple[PlannedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    quantize: Mapping[str, str]
    trained: tuple[str, ...]
    task_type: str | None
    total_parameters: int
    trained_parameters: int
    shared_input: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    _model: Any = field(default=None, repr=False, compare=False)
    _quantizers: Mapping[str, Quantizer] = field(default_factory=dict, repr=False, compare=False)

    @property
    def engine(self) -> str:
        """Return "direct", or "peft" if the request needs PEFT's own injection."""
        return self.layers[0].engine

    @property
    def adapter_parameters(self) -> int:
        """Return the number of values in the low-rank factors."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def trainable_parameters(self) -> int:
        """Return the number of values that will be trained."""
        return self.adapter_parameters + self.trained_parameters

    def memory(
        self,
        batch_size: int = 1,
        sequence_length: int = 512,
        *,
        optimizer: str = "adamw",
        autocast: Any = None,
        device: str | None = None,
    ) -> StepMemory:
        """Predict the memory of one training step in bytes, without running it.

        Args:
            batch_size: rows per step.
            sequence_length: tokens per row; text models only.
            optimizer: see `lora_adapters.memory.predict_step`.
            autocast: dtype of mixed precision, such as torch.bfloat16, or None.
            device: where the step will run; None takes the model's device. "cuda" works without CUDA too.

        Raises:
            UnsupportedError: the model's forward can't be traced without data; the message says where.
        """
        from .inject import planned_on_meta
        from .memory import predict_step

        backend = backend_for(self._model)[0]
        copy = planned_on_meta(self._model, self)
        # Real inputs: a model that looks at its mask's values then takes the branch it will take in training.
        inputs = backend.example_inputs(self._model, batch_size, sequence_length, "cpu")
        device = device or next((p.device.type for p in self._model.parameters() if p.device.type != "meta"), "cpu")
        return predict_step(copy, inputs, optimizer=optimizer, autocast=autocast, device=device)

    def __str__(self) -> str:
        from .report.plan_table import render

        return render(self)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model under a PeftModel (and under torch.compile), else the model itself."""
    model = getattr(model, "_orig_mod", model)
    if any(cls.__module__.split(".")[0] == "peft" and cls.__name__ == "PeftModel" for cls in type(model).__mro__):
        model = model.get_base_model()  # type: ignore[operator]
    return model


def backend_for(model: nn.Module) -> tuple[Backend, tuple[str, ...]]:
    """Return the backend that knows the model, and notes about the choice."""
    modules = {cls.__module__ for cls in type(model).__mro__}
    for spec in plugins().backends():
        if any(m == p or m.startswith(p + ".") for m in modules for p in spec.module_prefixes):
            try:
                require(spec.requires, spec.extra, f"Backend {spec.name!r}")
                return load_object(spec.target)(), ()
            except Exception as error:
                note = f"backend {spec.name!r} could not be used ({type(error).__name__}: {error})"
                warnings.warn(f"{note}; the generic one serves instead.", LoraAdaptersWarning, stacklevel=2)
    from .generic import GenericBackend

    note = f"no backend knows {type(model).__name__}: the generic PyTorch backend takes layers by their class alone."
    return GenericBackend(), (note,)


def make_plan(model: nn.Module, request: AttachRequest) -> AttachPlan:
    """Return the plan for a request. Works on a meta-device model; changes nothing.

    Raises:
        RequestError, NoTargetError: the request can't be met; the message says what to ask for instead.
    """
    base = unwrap(model)
    backend, notes = backend_for(base)
    info = ModelInfo(backend.name, backend.family(base), candidates(base), base)
    shared = _Shared.of(base)
    classes = _classify(backend, info, request)
    trained = request.modules_to_save
    if trained is None:
        trained = backend.heads_to_train(base)
    trained_names = _trained_names(base, trained)
    _refuse_shared(trained_names, base)
    chosen = select(request, [n for n in info.modules if not _inside(n, trained_names)], classes, shared.other_names)
    quantize, quantizers = _assign_quantizers(info, classes, request, trained_names, backend, shared.tied)
    layers, skipped, specs = [], [], _LayerSpecs()
    for name, module in info.modules.items():
        role = classes.roles.get(name, "other")
        if name in chosen:
            layer = _plan_layer(name, module, chosen[name], request, quantizers, classes, specs, shared.tied)
            (layers if isinstance(layer, PlannedLayer) else skipped).append(layer)
        else:
            reason = "trained whole" if _inside(name, trained_names) else classes.never.get(name, "not in targets")
            skipped.append(SkippedLayer(name, role, reason))
    if not layers:
        raise NoTargetError(f"None of the {len(chosen)} chosen layers can be adapted: {skipped[0].reason}.")
    plan = AttachPlan(
        backend=backend.name,
        family=info.family,
        request=request,
        layers=tuple(layers),
        skipped=tuple(skipped),
        quantize={name: quantizers[name].name for name in quantize},
        trained=trained,
        task_type=request.peft_fields.get("task_type") or backend.task_type(base),
        total_parameters=sum(_numel(p) for p in _plain_parameters(base)),
        trained_parameters=_count_trained(base, trained_names, request, layers),
        shared_input=classes.shared_input,
        notes=(*notes, *classes.notes, *shared.notes(base, layers, request)),
        _model=base,
        _quantizers=quantizers,
    )
    return _edited(plan)


def _classify(backend: Backend, info: ModelInfo, request: AttachRequest) -> Classification:
    classes = backend.classify(info, plugins().target_maps())
    answer = plugins().first("lora_adapters_resolve_targets", info=info, request=request)
    if answer is None:
        return classes
    plugin, roles = answer
    if unknown := [name for name in roles if name not in info.modules]:
        raise PluginError(f"Plugin {plugin!r} gave a role to {unknown[0]!r}, which is no layer of this model.")
    note = f"roles from plugin {plugin!r}"
    return replace(classes, roles=dict(roles), notes=(*classes.notes, note), unverified="")


def _inside(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def modules_meant(model: nn.Module, key: str) -> dict[str, nn.Module]:
    """Return name -> module of what PEFT takes a `modules_to_save` entry to mean, seen through its wrappers."""
    return {
        name: getattr(module, "original_module", module)  # type: ignore[misc]
        for name, module in model.named_modules()
        if name.endswith(key) and ".modules_to_save" not in name and ".original_module" not in name
    }


def _trained_names(model: nn.Module, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Return full names of the modules that `modules_to_save` means."""
    from .weights import store_for

    found: dict[str, nn.Module] = {}
    for key in wanted:
        matched = modules_meant(model, key)
        if not matched:
            raise NoTargetError(f"modules_to_save {key!r} matches no module of {type(model).__name__}.")
        found |= matched
    for name, module in found.items():
        stores = (store_for(part) for part in module.modules())
        if any(store is not None and store.format != "dense" for store in stores):
            raise UnsupportedError(
                f"{name!r} can't be trained whole: it is quantized. Adapt it instead (name it in targets), or load the "
                "model with this module dense: quantization as a mapping of the roles to quantize, or a "
                "BitsAndBytesConfig with llm_int8_skip_modules."
            )
    return tuple(found)


def _refuse_shared(trained: tuple[str, ...], model: nn.Module) -> None:
    """Raise if a module to train whole is registered more than once: PEFT would train a copy in the first place only."""
    places = places_of(model) if trained else {}
    for name in trained:
        count = len(places.get(id(model.get_submodule(name)), ()))
        if count > 1:
            raise UnsupportedError(
                f"{name!r} can't be trained whole: the model holds it in {count} places, and PEFT would train a copy in "
                "the first one while the others keep the old weights. Adapt it instead: leave it out of modules_to_save "
                "(modules_to_save=[] trains none) and name it in targets."
            )


@dataclass(frozen=True)
class _Shared:
    """What the model shares: see `sharing`."""

    other_names: Mapping[str, str]
    tied: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> _Shared:
        """Look a model through. Names are those without adapters."""
        tied = {name.removesuffix(".base_layer"): reason for name, reason in tied_names(model).items()}
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


def base_of(module: nn.Module) -> nn.Module:
    """Return the base module under PEFT layers, else the module itself."""
    get_base = getattr(module, "get_base_layer", None)
    return get_base() if callable(get_base) else module  # type: ignore[return-value]


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


def adapter_parameters(kind: str, shape: tuple[int, ...], rank: int, lora_bias: bool = False) -> int:
    """Return the number of values a LoRA of this rank adds to a weight of this shape.

    linear (out, in): r * (out + in); embedding (rows, dim): r * (rows + dim); conv (out, in / groups, *kernel):
    A is (r, in / groups, *kernel) and B (out, r, 1...), so r * (out + in / groups * prod(kernel)).
    """
    return rank * (shape[0] + math.prod(shape[1:])) + (shape[0] if lora_bias else 0)


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
    foreign = foreign_tuner(module)
    if foreign:
        return refuse(f"it already carries a {foreign} adapter; LoRA on top of it is not supported")
    store = store_for(base)
    quantizer = quantizers.get(name)
    spec = specs.of(base if quantizer is None else quantizer.quantize(_meta_like(base), torch.float32))
    if store is None or spec is None:
        return refuse(f"no adapter layer for class {type(base).__module__}.{type(base).__qualname__}")
    shape = tuple(store.shape)
    if min(shape[0], math.prod(shape[1:])) < choice.rank:
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
        layer=spec.layer,
        engine="peft" if _special_fields(request) else "direct",
    )


def _meta_like(module: nn.Module) -> nn.Module:
    """Return a shallow copy of a dense module with its parameters on the meta device."""
    twin = copy.copy(module)
    twin._parameters = {
        n: None if p is None else torch.nn.Parameter(p.detach().to("meta"), requires_grad=False)
        for n, p in module._parameters.items()
    }
    return twin


def foreign_tuner(module: nn.Module) -> str:
    """Return the name of a PEFT method other than LoRA that a module carries, else ""."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("peft.tuners.") and cls.__name__.endswith("Layer"):
            method = cls.__module__.split(".")[2]
            if method not in ("lora", "tuners_utils"):
                return method
    return ""


def _assign_quantizers(
    info: ModelInfo,
    classes: Classification,
    request: AttachRequest,
    trained: tuple[str, ...],
    backend: Backend,
    tied: Mapping[str, str],
) -> tuple[dict[str, str], dict[str, Quantizer]]:
    """Return module name -> role and module name -> Quantizer of every base module to quantize."""
    wanted = request.quantization
    if wanted is None:
        return {}, {}
    from .weights import quantized_format

    existing = quantized_format(info.model)
    specs = plugins().quantizers()
    by_role = _roles_to_quantize(wanted, getattr(backend, "quantized_roles", QUANTIZED_ROLES), specs)
    if existing:
        if all(q.name == existing for q in by_role.values()):
            return {}, {}
        raise RequestError(
            f"The model is already quantized to {existing}, and quantization={wanted!r} asks for another format. "
            "Leave quantization out to keep it, or load the model again."
        )
    dense = getattr(backend, "dense_modules", lambda model: ())(info.model)
    roles, quantizers = {}, {}
    for name, module in info.modules.items():
        role = classes.roles.get(name, "other")
        quantizer = by_role.get(role)
        if quantizer is None or _inside(name, trained) or name in tied or quantizer.supports(base_of(module)):
            continue
        if any(_stays_dense(name, pattern) for pattern in (*dense, *getattr(quantizer, "skip", ()))):
            continue
        if base_of(module) is not module:
            raise RequestError(
                f"{name!r} already carries an adapter, so its base can't be quantized any more: quantize first."
            )
        roles[name], quantizers[name] = role, quantizer
    if not roles:
        raise UnsupportedError(f"quantization={wanted!r} can store none of this model's layers.")
    return roles, quantizers


def _stays_dense(name: str, pattern: str) -> bool:
    """Match a name as transformers matches llm_int8_skip_modules: a prefix, a regular expression or a suffix."""
    return name.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) is not None


def quantized_layers(model: nn.Module, quantization: Any) -> dict[str, str]:
    """Return module name -> format of what `attach(model, quantization=...)` would quantize, on any device."""
    base = unwrap(model)
    backend, _ = backend_for(base)
    info = ModelInfo(backend.name, backend.family(base), candidates(base), base)
    request = AttachRequest.make(quantization=quantization)
    trained = _trained_names(base, backend.heads_to_train(base))
    classes = _classify(backend, info, request)
    _, quantizers = _assign_quantizers(info, classes, request, trained, backend, tied_names(base))
    return {name: quantizer.name for name, quantizer in quantizers.items()}


def _roles_to_quantize(wanted: Any, default_roles: tuple[str, ...], specs: Mapping[str, Any]) -> dict[str, Quantizer]:
    from .weights import quantizer_for

    if not isinstance(wanted, Mapping):
        quantizer = quantizer_for(wanted, specs)
        return dict.fromkeys(default_roles, quantizer)
    by_role: dict[str, Quantizer] = {}
    for expression, fmt in wanted.items():
        for word in str(expression).split("+"):
            roles = expand(word.strip())
            if roles is None:
                raise RequestError(f"quantization: {word!r} is no role; give roles such as 'attention' or 'mlp'.")
            if fmt is not None:
                by_role |= dict.fromkeys(roles, quantizer_for(fmt, specs))
    return by_role


def _plain_parameters(model: nn.Module) -> list[Any]:
    return [p for name, p in model.named_parameters() if ".lora_" not in name and ".modules_to_save." not in name]


def _numel(parameter: Any) -> int:
    """Return the number of logical values: bitsandbytes packs two 4-bit values into a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def _count_trained(
    model: nn.Module, trained: tuple[str, ...], request: AttachRequest, layers: list[PlannedLayer]
) -> int:
    parameters = {id(p): p for name in trained for p in model.get_submodule(name).parameters()}
    bias = request.peft_fields.get("bias", "none")
    if bias == "all":
        parameters |= {id(p): p for n, p in model.named_parameters() if n == "bias" or n.endswith(".bias")}
    elif bias == "lora_only":
        biases = (getattr(base_of(model.get_submodule(layer.name)), "bias", None) for layer in layers)
        parameters |= {id(p): p for p in biases if p is not None}
    return sum(p.numel() for p in parameters.values())


def _edited(plan: AttachPlan) -> AttachPlan:
    """Apply the plugins' edits; two plugins that want different things of one layer are an error naming both."""
    layers = {layer.name: layer for layer in plan.layers}
    skipped = list(plan.skipped)
    asked: dict[tuple[str, str], tuple[str, Any]] = {}
    for plugin, edit in plugins().collect("lora_adapters_edit_plan", PlanEdit, plan=plan):
        for name in [n for n in layers if check_pattern(edit.pattern).search(n)]:
            for what in ("rank", "alpha", "skip"):
                value = getattr(edit, what)
                if value in (None, ""):
                    continue
                other = asked.setdefault((name, what), (plugin, value))
                if other[1] != value:
                    raise PluginError(
                        f"Plugins {other[0]!r} and {plugin!r} disagree on the {what} of {name!r}: {other[1]!r} and "
                        f"{value!r}. Block one of them with LORA_ADAPTERS_DISABLE."
                    )
    for (name, what), (plugin, value) in asked.items():
        if what == "skip":
            layer = layers.pop(name, None)
            if layer:
                skipped.append(SkippedLayer(name, layer.role, f"{value} (plugin {plugin!r})"))
        elif name in layers:
            layers[name] = _edit_layer(layers[name], what, value, plan.request)
    if not layers:
        raise NoTargetError("The plugins' edits leave no layer to adapt. See LORA_ADAPTERS_TRACE=1.")
    notes = plan.notes
    if asked:
        edits = Counter(plugin for plugin, _ in asked.values())
        notes += tuple(f"plugin {plugin!r} edited {count} values of the plan" for plugin, count in edits.items())
    return replace(plan, layers=tuple(layers.values()), skipped=tuple(skipped), notes=notes)


def _edit_layer(layer: PlannedLayer, what: str, value: Any, request: AttachRequest) -> PlannedLayer:
    rank = check_rank(value, f"rank of {layer.name}") if what == "rank" else layer.rank
    alpha = check_alpha(value, f"alpha of {layer.name}") if what == "alpha" else layer.alpha
    if what == "rank" and request.alpha is None and layer.alpha == layer.rank:
        alpha = rank
    lora_bias = bool(request.peft_fields.get("lora_bias"))
    parameters = adapter_parameters(layer.kind, layer.shape, rank, lora_bias)
    return replace(layer, rank=rank, alpha=alpha, scaling=request.scaling(rank, alpha), parameters=parameters)
