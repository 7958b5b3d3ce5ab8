"""Merging a whole model's layers: all of them or none. What one layer does is in layers/engine.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from . import batch_norm
from .backends import backend_for
from .errors import MergeError
from .layers.engine import EngineLayer
from .sharing import places_of, put


def merge(
    peft_model: PeftModel,
    base: nn.Module,
    names: list[str],
    keep: bool = True,
    report: Callable[[int, int, str], None] | None = None,
) -> None:
    """Merge adapters into every layer that carries them.

    Args:
        peft_model: the PeftModel around `base`.
        base: the adapted model.
        names: adapters to merge.
        keep: keep the old weights for `unmerge`. Without, merging takes no second copy of the weights, and there is no
            way back: not when merging fails either, so the model must then be let go.
        report: called with done, total and the layer's name.

    Raises:
        MergeError: one layer can't be merged; those merged before it have been unmerged again (if `keep`).
    """
    layers = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer)}
    fresh = {n: m for n, m in layers.items() if _carried(m, names) and not m.merged}
    _check_finite(fresh, names)
    done: list[LoraLayer] = []
    for name, layer in fresh.items():
        if report:
            report(len(done), len(fresh), name)
        try:
            layer.merge(safe_merge=True, adapter_names=_carried(layer, names))
        except Exception as error:
            if keep:
                unmerge(done)
            raise MergeError(f"{name!r} can't be merged, so nothing was: {error}") from error
        if not keep and isinstance(layer, EngineLayer):
            layer.let_go()
        done.append(layer)


def _carried(layer: LoraLayer, names: Iterable[str]) -> list[str]:
    return [n for n in names if n in layer.lora_A or n in layer.lora_embedding_A]


def _check_finite(layers: dict[str, LoraLayer], names: list[str]) -> None:
    """Look at the small factors first: a broken adapter is then refused before any large weight is touched."""
    for layer_name, layer in layers.items():
        for name, parameter in layer.named_parameters():  # type: ignore[attr-defined]
            if any(f".{adapter}" in name for adapter in names) and not torch.isfinite(parameter).all():
                raise MergeError(
                    f"{layer_name}.{name} holds values that are not finite, so nothing was merged. Training has "
                    "diverged, or the file is damaged: use an earlier checkpoint."
                )


def unmerge(layers: Iterable[LoraLayer]) -> None:
    """Unmerge every merged layer of `layers`."""
    for layer in layers:
        if layer.merged:
            layer.unmerge()


@contextmanager
def _own_base_layers_renamed(model: nn.Module) -> Iterator[None]:
    """Rename children of the model's own that are called `base_layer`: PEFT unloads any module that has one (timm's dla)."""
    owners = [m for m in model.modules() if "base_layer" in m._modules and not isinstance(m, LoraLayer)]

    def rename(old: str, new: str) -> None:
        for owner in owners:
            children = {new if name == old else name: child for name, child in owner._modules.items()}
            owner._modules.clear()
            owner._modules.update(children)

    rename("base_layer", "own_base_layer")
    try:
        yield
    finally:
        rename("own_base_layer", "base_layer")


def unload(peft_model: PeftModel) -> nn.Module:
    """Replace every adapter layer by its (merged) base module, wherever it is registered, and return the plain model."""
    base = peft_model.get_base_model()
    places = places_of(base)
    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    config = getattr(base, "config", None)
    tie = getattr(config, "tie_word_embeddings", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|no longer tied).*")
        with _own_base_layers_renamed(base):
            model = peft_model.merge_and_unload(progressbar=False)  # type: ignore[operator]
    for layer in layers:
        if len(spots := places[id(layer)]) > 1:
            put(spots, layer.get_base_layer())  # PEFT takes it out of the first place only
    # PEFT turns tying off for the whole model when the embeddings have parted: the backend looks closer.
    if tie is not None:
        config.tie_word_embeddings = tie  # type: ignore[union-attr]
    unloaded = getattr(backend_for(model)[0], "unloaded", None)
    if unloaded is not None:
        unloaded(model)
    batch_norm.release(model)
    return model
