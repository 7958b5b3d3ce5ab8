"""Loads timm models for `lora_adapters.load`: their weights read, checked to fit in memory, quantized if asked."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_model_config_from_hf
from torch import nn

from lora_adapters.adapter_file import AdapterFile
from lora_adapters.attach_plan import AttachPlan
from lora_adapters.device import pick_device
from lora_adapters.errors import CheckpointError, LoraAdaptersError, RequestError
from lora_adapters.hooks.manager import require
from lora_adapters.inject import quantize
from lora_adapters.planning import make_plan
from lora_adapters.preflight import LoadNeed, check_fits
from lora_adapters.quantized import quantized_layers
from lora_adapters.request import AttachRequest

from .building import create, create_on_meta, is_folder, source_of
from .facts import Facts
from .heads import classifiers, pretrained_cfg

#: Model that `load` returned -> names of the weights its checkpoint did not hold.
_new_weights: weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]] = weakref.WeakKeyDictionary()


def load(
    name: str,
    *,
    quantization: Any,
    dtype: torch.dtype | str,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
    pretrained: bool = True,
    checkpoint: str | None = None,
    architecture: str | None = None,
    plan: AttachPlan | None = None,
    **options: Any,
) -> nn.Module:
    """Load a model; see `lora_adapters.load`.

    Args:
        name: a name or folder as `building.source_of` takes it, or a file of weights.
        quantization, device, revision: as there.
        dtype: "auto" is float32, in which timm builds its models.
        trust_remote_code: nothing to timm, which runs none.
        pretrained: read the weights (default). False leaves random ones; a folder's and a file's are read all the same.
        checkpoint: a file with weights of this model, instead of those that timm knows for it. A classifier of another
            size is new.
        architecture: timm's name of the model, where `name` is a file of weights.
        plan: store the base as this plan does, made on the model's skeleton. `quantization` must be None then.
        **options: what timm.create_model and the model take, such as num_classes or img_size.

    Raises:
        RequestError: an unknown name or argument. LoraAdaptersError: the weights can't be had.
        DoesNotFitError: it needs more memory than is free.
    """
    if plan is not None and quantization is not None:
        raise RequestError("A plan says how the base is stored: leave quantization out.")
    name, checkpoint = _name_and_file(name, checkpoint, architecture)
    pretrained = pretrained or checkpoint is not None or is_folder(name)
    target, options = pick_device(device), {**options, "revision": revision, "dtype": _dtype(dtype)}
    bare = create_on_meta(name, **options)
    if plan is not None:
        formats = dict(plan.quantize)
    else:
        formats = quantized_layers(bare, quantization) if quantization is not None else {}
    if formats:
        require(("bitsandbytes",), "bnb", f"quantization={quantization!r}")
    _check_memory(bare, target, pretrained)
    model = _with_weights(name, pretrained, checkpoint, options).to(target)
    _new_weights[model] = _not_in_checkpoint(model, pretrained)
    if formats:
        quantize(model, plan or make_plan(model, AttachRequest.make(quantization=quantization)))
    return model


def skeleton(
    name: str,
    *,
    dtype: torch.dtype | str,
    revision: str | None,
    trust_remote_code: bool,
    pretrained: bool = True,
    checkpoint: str | None = None,
    architecture: str | None = None,
    **options: Any,
) -> nn.Module:
    """Return the model that `load` would load, on the meta device. No weight is read."""
    name, _ = _name_and_file(name, checkpoint, architecture)
    return create_on_meta(name, revision=revision, dtype=_dtype(dtype), **options)


def _name_and_file(name: str, checkpoint: str | None, architecture: str | None) -> tuple[str, str | None]:
    if checkpoint is not None or not Path(name).expanduser().is_file():
        return name, checkpoint
    if architecture is None:
        raise RequestError(
            f"Nothing says which model {name} holds. Give timm's name of it (architecture=...), or load that name with "
            f"checkpoint={name!r}."
        )
    return architecture, str(Path(name).expanduser())


def _with_weights(name: str, pretrained: bool, checkpoint: str | None, options: dict[str, Any]) -> nn.Module:
    if checkpoint is None:
        return create(name, pretrained=pretrained, **options)
    try:
        return create(name, pretrained=True, checkpoint=checkpoint, keep_head=True, **options)
    except LoraAdaptersError as error:
        if "size mismatch" not in str(error.__cause__):
            raise
        # A classifier of another size is left out; anything else that differs fails again.
        return create(name, pretrained=True, checkpoint=checkpoint, **options)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = torch.float32 if dtype == "auto" else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RequestError(f"{dtype!r} is no floating dtype. Give 'auto', 'float32', 'bfloat16' or 'float16'.")
    return found


def _check_memory(bare: nn.Module, device: torch.device, pretrained: bool) -> None:
    """Raise if the load doesn't fit: timm builds the model in float32 on the host, and reads the whole file beside it."""
    tensors = [*bare.parameters(), *bare.buffers()]
    host = 4 * sum(tensor.numel() for tensor in tensors) * (2 if pretrained else 1)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    check_fits(LoadNeed(host, 0 if device.type == "cpu" else size, str(device)))


def _not_in_checkpoint(model: nn.Module, pretrained: bool) -> tuple[str, ...]:
    names = tuple(name for name, _ in model.named_parameters())
    if not pretrained or getattr(model, "num_classes", None) == pretrained_cfg(model).get("num_classes"):
        return () if pretrained else names
    heads = tuple(f"{head}." for head in classifiers(model))
    return tuple(name for name in names if name.startswith(heads)) if heads else ()


def new_weights(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of a loaded model that its checkpoint did not hold: they have random values."""
    return _new_weights.get(model, ())


def can_load(name: str, revision: str | None = None) -> bool:
    """Return True if `name` is a model that timm registers, or a folder or a Hub name with timm's config.json."""
    try:
        kind, _, place = source_of(name, revision).rpartition(":")
        if kind == "local-dir":
            return timm.is_model(json.loads((Path(place) / "config.json").read_text(encoding="utf-8"))["architecture"])
        return not kind or timm.is_model(load_model_config_from_hf(place)[1])
    except Exception:  # Offline, no such name, another framework's config: all mean no.
        return False


# ---- what a saved adapter says of its base ---------------------------------------------------------------------------


def base_of(file: AdapterFile, with_weights: bool) -> str:
    """Return the name of the base that a saved adapter is for, as its file says.

    Args:
        file: the adapter's.
        with_weights: the name must be one by which the base's weights are found.

    Raises:
        CheckpointError: the file does not say it.
    """
    if with_weights:
        found = file.config.get("base_model_name_or_path")
        hint = "it had no name with weights: give the model, or its name and a file of its weights (checkpoint=)"
    else:
        found = Facts.read(file.metadata).architecture
        hint = "give timm's name of it (model=)"
    if not found:
        raise CheckpointError(f"{file.folder} does not say which base the adapter is for; {hint}.")
    return found


def adapter_options(
    name: str, file: AdapterFile, *, revision: str | None, trust_remote_code: bool, **given: Any
) -> dict[str, Any]:
    """Return the options of `load` that give the model a saved adapter was trained on. `given` ones stay.

    Raises:
        CheckpointError: what the file says is damaged, or it is of another architecture than the base.
    """
    known = Facts.read(file.metadata)
    options = {**known.arguments, **given}
    if known.architecture is None:
        return options
    wanted = known.architecture.partition(".")[0]
    if options.get("checkpoint") is None and Path(name).expanduser().is_file():
        options.setdefault("architecture", wanted)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    found = pretrained_cfg(skeleton(name, dtype="auto", **source, **options)).get("architecture")
    if found not in (None, wanted):
        raise CheckpointError(f"The adapter was trained on a {wanted}, and {name} is a {found}. Give its own base.")
    return options


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Within this context the Hub's client, by which timm downloads, shows its progress bars, or none."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    def switch(on: bool) -> None:
        with warnings.catch_warnings():
            # It warns where HF_HUB_DISABLE_PROGRESS_BARS is set, which has the last word.
            warnings.filterwarnings("ignore", message=".*HF_HUB_DISABLE_PROGRESS_BARS.*")
            enable_progress_bars() if on else disable_progress_bars()

    before = not are_progress_bars_disabled()
    switch(show)
    try:
        yield
    finally:
        switch(before)
