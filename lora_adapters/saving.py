"""Between a model and a checkpoint folder: what to write of an adapter, and a restore that checks before it changes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from . import batch_norm, inject
from .adapter_file import (
    HELD_TWICE_ENTRY,
    NORM_ENTRY,
    PARTS_ENTRY,
    PREFIX,
    AdapterFile,
    check_copies,
    check_supported,
    check_tensors,
    inspect_adapter,
    read_adapter,
)
from .attach_plan import AttachPlan, PlannedLayer
from .backends import base_of
from .base_kernels import with_kernels
from .checkpoint import resolve_adapter_path, write_adapter
from .errors import CheckpointError, UnsupportedError
from .layers.conv import SharedConv1d, SharedConv2d
from .layers.part_factors import mask_of
from .planning import make_plan
from .projection_parts import from_metadata, to_metadata
from .request import AttachRequest
from .sharing import held_twice
from .snapshot import Changes
from .targets import Kernels, Part, candidates
from .trained import modules_meant
from .weights import store_for
from .wrappers import within_trained

#: Config fields that say what the layers compute; the others say how the adapter came to be.
_CARRIED = ("use_rslora", "use_dora", "lora_bias", "bias", "task_type", "fan_in_fan_out", "init_lora_weights")


def save_adapter(peft_model: PeftModel, plan: AttachPlan, folder: Path, metadata: Mapping[str, Any]) -> Path:
    """Write the plan's adapter as a PEFT checkpoint folder, as one act. Returns the folder."""
    name = plan.request.adapter_name
    tensors = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    base = peft_model.get_base_model()
    described = {"lora_adapters.base_class": type(base).__name__, **{k: str(v) for k, v in metadata.items()}}
    if shared := _grouped(base, name):
        inject.warn(
            f"{shared[0]!r} is a convolution with groups ({len(shared)} such layers), for which PEFT's adapters have other "
            f"shapes, so stock PEFT can't load {folder}: restore it with lora_adapters.restore, or merge the adapter "
            "before sharing the model."
        )
    if twice := held_twice(base, _layer_names(base, name)):
        described[HELD_TWICE_ENTRY] = ",".join(twice)
        inject.warn(
            f"{twice[0]!r} is one module in several places, and stock PEFT adapts it in the first place only: restore "
            f"{folder} with lora_adapters.restore, or merge the adapter before sharing the model."
        )
    if read := [n for n in _layer_names(base, name) if getattr(base.get_submodule(n), "effective", False)]:
        inject.warn(
            f"The weight of {read[0]!r} is read by other code, or by a forward of its class's own ({len(read)} such "
            f"layers). Stock PEFT's layers don't notice that and may compute something else, or nothing: restore {folder} "
            "with lora_adapters.restore, or merge the adapter before sharing the model."
        )
    if nested := within_trained(base, plan):
        inject.warn(
            f"{nested[0]!r} is inside a module that is trained whole and ends like one, which stock PEFT takes for two "
            f"modules and can't load: restore {folder} with lora_adapters.restore, or merge the adapter before sharing."
        )
    if parts := {layer.name: layer.parts for layer in plan.layers if layer.parts}:
        described[PARTS_ENTRY] = to_metadata(parts)
    if batch_norm.batch_norms(base):
        described[NORM_ENTRY] = plan.request.norm
    config: Any = copy.copy(peft_model.peft_config[name])
    config.base_model_name_or_path = config.base_model_name_or_path or _name_of(base)
    if config.task_type is None:
        # As stock PEFT writes it: its Auto classes find the model's class by this.
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    write_adapter(folder, config, tensors, described)
    return folder


def _name_of(base: nn.Module) -> str | None:
    """Return where the base was loaded from, if its framework keeps that where PEFT looks for it."""
    name = vars(base).get("name_or_path")
    # A path that no config may hold must not keep the adapter from being saved.
    return name if isinstance(name, str) and 0 < len(name) <= 4096 and name.isprintable() else None


def restore_adapter(
    base: nn.Module,
    peft_model: PeftModel | None,
    path: str | Path,
    name: str,
    revision: str | None,
    ways: Mapping[str, Any],
) -> tuple[PeftModel, AttachPlan, Changes, Kernels | None]:
    """Attach a saved adapter to `base`; see `lora_adapters.restore`. `ways` are fields of the request: fused, liger."""
    file = inspect_adapter(resolve_adapter_path(path, revision))
    plan = checked_plan(base, file, name)
    plan = replace(plan, request=replace(plan.request, **ways))
    tensors = read_adapter(file)
    _check_parts(plan, tensors)
    check_copies(file, tensors, {module: _dense(base, module) for module in file.copies.values()})
    values = {key: tensor for key, tensor in tensors.items() if key not in file.copies}
    with with_kernels(base, plan) as (plan, kernels):
        result, changes = inject.apply(base, plan, peft_model, load=lambda model: _load(model, plan, values))
    return result, plan, changes, kernels


def checked_plan(base: nn.Module, file: AdapterFile, name: str = "default") -> AttachPlan:
    """Return how a file's adapter goes onto `base`. The base's names and shapes are enough: it may be on meta.

    Raises:
        CheckpointError: the file is incomplete or made for another model.
        UnsupportedError: only stock PEFT can restore it.
    """
    check_supported(file)
    plan = _plan(base, file, name)
    _refuse_half_adapted(base, plan, file)
    check_tensors(file, expected_tensors(base, plan))
    return plan


def _layer_names(base: nn.Module, name: str) -> list[str]:
    layers = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer)}
    return [n for n, layer in layers.items() if name in layer.lora_A or name in layer.lora_embedding_A]


def _grouped(base: nn.Module, name: str) -> list[str]:
    """Return the convolutions whose groups share one A, which PEFT's own layers (its DoRA, say) don't do."""
    layers: dict[str, Any] = {n: base.get_submodule(n) for n in _layer_names(base, name)}
    shared = (SharedConv1d, SharedConv2d)
    return [n for n, m in layers.items() if name in m.lora_A and isinstance(m.lora_A[name], shared)]


def _refuse_half_adapted(base: nn.Module, plan: AttachPlan, file: AdapterFile) -> None:
    """Raise for a file of stock PEFT, whose adapter acts in the first place of a module only, where ours acts in all."""
    said = file.metadata.get(HELD_TWICE_ENTRY, "").split(",")
    if strange := [n for n in held_twice(base, [layer.name for layer in plan.layers]) if n not in said]:
        raise UnsupportedError(
            f"{strange[0]!r} is one module in several places. In stock PEFT, which wrote this file, the adapter acts in "
            "the first of them only, which can't be had here. Load it with PeftModel.from_pretrained(model, folder)."
        )


def _dense(base: nn.Module, module: str) -> torch.Tensor:
    store = store_for(base_of(base.get_submodule(module)))
    if store is None:
        raise UnsupportedError(f"The weight of {module!r} can't be read, so the file's copy of it can't be checked.")
    return store.read()


def _check_parts(plan: AttachPlan, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise if lora_B of a layer adapted in parts changes rows of other parts: a mask would drop what it does there."""
    for layer in (layer for layer in plan.layers if layer.parts):
        b = tensors[f"{PREFIX}{layer.name}.lora_B.weight"].flatten(1)
        if torch.count_nonzero(b[~mask_of(layer.parts, b.shape[0], b.device)]):
            raise CheckpointError(
                f"lora_B of {layer.name!r} changes rows that by the file's own entry it does not adapt. The file is "
                "damaged: copy or download it again."
            )


def _parts(file: AdapterFile) -> dict[str, tuple[Part, ...]]:
    entry = file.metadata.get(PARTS_ENTRY)
    if entry is None:
        return {}
    return from_metadata(entry, {n: (m.rank, m.shapes["b"][0]) for n, m in file.modules.items()})


def _norm(base: nn.Module, file: AdapterFile, saved: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return the mode of BatchNorm that a file was trained in, and the modules it saves whole beside BatchNorm.

    A file that does not say, as stock PEFT's, holds BatchNorms like any other module that is trained whole.
    """
    mode = file.metadata.get(NORM_ENTRY, "eval")
    if mode == "eval":
        return mode, saved
    if mode not in ("train", "affine"):
        raise CheckpointError(f"The file says norm={mode[:40]!r}, which is no mode of BatchNorm. Get the file again.")
    norms = batch_norm.batch_norms(base)
    return mode, tuple(name for name in saved if not set(modules_meant(base, name)) <= set(norms))


def _plan(base: nn.Module, file: AdapterFile, name: str) -> AttachPlan:
    known = candidates(base)
    strange = [module for module in file.modules if module not in known]
    if strange:
        raise CheckpointError(
            f"The adapter was made for another model: {len(strange)} of its {len(file.modules)} layers are not in "
            f"this {type(base).__name__}, first {strange[0]!r}."
        )
    if missing := file.missing_targets(list(known)):
        raise CheckpointError(
            f"The adapter file is incomplete, or made for another model: by its config {len(missing)} more layers "
            f"should be adapted, first {missing[0]!r}."
        )
    alphas = file.config.alphas(list(file.modules))
    exact = {module: (file.modules[module].rank, alphas[module]) for module in file.modules}
    fields = {key: value for key in _CARRIED if (value := file.config.get(key)) is not None}
    if fields.get("init_lora_weights") in ("gaussian", "orthogonal", "eva", False):
        fields["init_lora_weights"] = True
    norm, saved = _norm(base, file, _saved_modules(base, file.config.get("modules_to_save") or ()))
    request = AttachRequest.make(
        exact=exact,
        exact_parts=_parts(file),
        norm=norm,
        adapter_name=name,
        dropout=file.config.get("lora_dropout", 0.0),
        modules_to_save=saved,
        **fields,
    )
    return make_plan(base, request)


def _saved_modules(base: nn.Module, wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the names that mean a module here, each once.

    PEFT's task classes add every usual name of a head ("classifier", "score") to the config, whichever the model has.
    A name left out hides nothing: tensors of such a module would be refused as unexpected.
    """
    return tuple(dict.fromkeys(name for name in wanted if modules_meant(base, name)))


def expected_tensors(base: nn.Module, plan: AttachPlan) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of every tensor that a checkpoint of this plan holds."""
    fields = plan.request.peft_fields
    expected: dict[str, tuple[int, ...]] = {}
    for layer in plan.layers:
        # PEFT's own layers (of DoRA, say) divide B's ranks among a convolution's groups, and A reads every channel.
        groups = getattr(base_of(base.get_submodule(layer.name)), "groups", 1) if layer.engine == "peft" else 1
        for suffix, shape in _layer_tensors(layer, fields, groups).items():
            expected[f"{PREFIX}{layer.name}.{suffix}"] = shape
    for wanted in (*plan.trained, *plan.norms):
        for name, module in modules_meant(base, wanted).items():
            for key, tensor in module.state_dict().items():
                expected[f"{PREFIX}{name}.{key}"] = tuple(tensor.shape)
    for name, bias in _trained_biases(base, plan):
        expected[f"{PREFIX}{name}"] = tuple(bias.shape)
    return expected


def _layer_tensors(layer: PlannedLayer, fields: Mapping[str, Any], groups: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one layer; `groups` are those that share out its ranks."""
    out, *rest = layer.shape
    if layer.kind == "embedding":
        found = {"lora_embedding_A": (layer.rank, out), "lora_embedding_B": (rest[0], layer.rank)}
        return found | ({"lora_magnitude_vector": (rest[0],)} if fields.get("use_dora") else {})
    ones = (1,) * (len(rest) - 1)
    a = (layer.rank, rest[0] * groups, *rest[1:])
    found = {"lora_A.weight": a, "lora_B.weight": (out, layer.rank // groups, *ones)}
    if fields.get("lora_bias"):
        found["lora_B.bias"] = (out,)
    if fields.get("use_dora"):
        found["lora_magnitude_vector"] = (1, out, *ones) if ones or layer.kind != "linear" else (out,)
    return found


def _trained_biases(base: nn.Module, plan: AttachPlan) -> list[tuple[str, torch.Tensor]]:
    kind = plan.request.peft_fields.get("bias", "none")
    if kind == "none":
        return []
    adapted = {layer.name for layer in plan.layers}
    found = []
    for name in inject.plain_names(base):
        bias = getattr(base_of(base.get_submodule(name)), "bias", None)
        if not isinstance(bias, nn.Parameter):
            continue
        if name in adapted:
            found.append((f"{name}.base_layer.bias", bias))
        elif kind == "all":
            found.append((f"{name}.bias", bias))
    return found


def _load(peft_model: PeftModel, plan: AttachPlan, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a file's tensors into the adapter's parameters, by the names they have in the model."""
    name = plan.request.adapter_name
    state = {_plain_key(key, name): value for key, value in peft_model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        for key, tensor in tensors.items():
            target = state.get(key)
            if not isinstance(target, torch.Tensor):
                raise CheckpointError(f"{key} has no place in the model. The adapter was made for another model.")
            target.data.copy_(tensor)


def _plain_key(key: str, name: str) -> str:
    """Return the key under which PEFT saves a parameter of the adapter `name`."""
    key = key.replace(f".modules_to_save.{name}.", ".")
    for infix in ("lora_A", "lora_B"):
        key = key.replace(f".{infix}.{name}.", f".{infix}.")
    for suffix in ("lora_embedding_A", "lora_embedding_B"):
        if key.endswith(f".{suffix}.{name}"):
            return key.removesuffix(f".{name}")
    return key.replace(f".lora_magnitude_vector.{name}.weight", ".lora_magnitude_vector")
