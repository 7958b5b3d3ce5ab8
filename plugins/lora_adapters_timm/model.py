"""TimmLoraModel: a timm model with an adapter, which timm's own tools take for a timm model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

import lora_adapters
from lora_adapters.adapter import Adapter
from lora_adapters.adapter_file import inspect_adapter
from lora_adapters.backends import backend_for, unwrap
from lora_adapters.checkpoint import resolve_adapter_path
from lora_adapters.errors import RequestError, StateError
from lora_adapters.inject import quantize
from lora_adapters.planning import make_plan
from lora_adapters.request import AttachRequest
from lora_adapters.snapshot import Snapshot

from . import loading, own_keys
from .building import create, is_folder
from .groups import group_matcher
from .heads import classifiers
from .merged import write_merged


class TimmLoraModel(nn.Module):
    """A timm model that trains by LoRA.

    It is a view of the timm model: the same modules under the same names, so that parameters are called as timm calls them
    and its tools (optimizers with layer decay, schedulers, Mixup, checkpoint loaders) work. Whatever else the model has
    (`pretrained_cfg`, `num_features`, `group_matcher`, `forward_features`, ...) is there too.

    Its state_dict holds the base's keys as a plain timm model has them, the adapter's ("....lora_A.default.weight") and,
    for modules trained whole, what they were before ("head.original_module.weight"). load_state_dict takes that, and also
    a plain timm checkpoint of the base, which leaves the adapter as it is.

    A deepcopy computes, and trains, like the original, but has no handle `adapter`: save the original.

    Args:
        name_or_model: a model of timm ("vit_base_patch16_224"), "hf-hub:org/name", a folder, or a timm model, which is
            adapted in place. A folder's weights are always read.
        num_classes: classes of a new classifier; None keeps the model's own.
        rank, alpha, dropout, targets, quantization, adapter_name, norm: see `lora_adapters.attach`. `norm` says what
            becomes of BatchNorm: "eval" (frozen), "train" (statistics follow the data and are saved), "affine" (trained).
        train_head: train and save the classifier whole, bias included; False leaves it as it is.
        pretrained: load weights, as in timm.create_model.
        checkpoint: a file with weights of this model, instead of those that timm knows for it. Its classifier is not taken.
        attach_options: other arguments of `lora_adapters.attach`, such as {"layers": range(6, 12), "seed": 0}.
        **timm_kwargs: what timm.create_model takes besides, such as img_size, in_chans, drop_path_rate, features_only.

    Raises:
        RequestError: a wrong argument. LoraAdaptersError: the weights can't be had. Whatever `attach` raises.
    """

    def __init__(
        self,
        name_or_model: str | nn.Module,
        num_classes: int | None = None,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: Any = "auto",
        quantization: Any = None,
        train_head: bool = True,
        pretrained: bool = False,
        *,
        norm: str = "eval",
        adapter_name: str = "default",
        checkpoint: str | None = None,
        attach_options: Mapping[str, Any] | None = None,
        **timm_kwargs: Any,
    ) -> None:
        given = {"num_classes": num_classes, **timm_kwargs}
        base = _base(name_or_model, pretrained, checkpoint, given)
        wanted = {
            "rank": rank,
            "alpha": alpha,
            "dropout": dropout,
            "targets": targets,
            "quantization": quantization,
            "norm": norm,
            "adapter_name": adapter_name,
            **({} if train_head else {"modules_to_save": ()}),
        }
        if twice := wanted.keys() & (attach_options or {}).keys():
            raise RequestError(f"{min(twice)} is given in attach_options and as an argument: give it once.")
        before = Snapshot(base)
        try:
            if isinstance(name_or_model, nn.Module) and num_classes is not None and base.num_classes != num_classes:
                base.reset_classifier(num_classes)
            adapter = lora_adapters.attach(base, **wanted, **(attach_options or {}))
        except BaseException:
            before.changes().revert()
            raise
        self._become(base, adapter)

    def _become(self, base: nn.Module, adapter: Adapter) -> None:
        """Make this module a view of `base`."""
        super().__init__()
        # The very dictionaries: what either of them registers or replaces, the other has.
        for shared in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[shared] = base.__dict__[shared]
        # In a tuple, where nn.Module does not find it: it is no child.
        self.__dict__["_view"] = (base, adapter.name)
        self.__dict__["_handle"] = adapter
        self.training = base.training
        self._register_state_dict_hook(_to_own)
        self.register_load_state_dict_pre_hook(_from_own)
        self.register_load_state_dict_post_hook(_forgive_missing)

    # ---- what it is made of ------------------------------------------------------------------------------------------

    @property
    def base(self) -> Any:
        """The timm model."""
        return self._view[0]

    @property
    def adapter(self) -> Adapter:
        """The adapter's handle: summary, norms, disabled, merge, detach.

        Raises:
            StateError: this is a copy.
        """
        if self._handle is None:
            raise StateError("This is a copy of a TimmLoraModel, which has no adapter handle: use the original's.")
        return self._handle

    def __getattr__(self, name: str) -> Any:
        """Return what the timm model has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_view" not in self.__dict__:
                raise
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What the timm model has is set there, where its own methods look; what tools leave here by other names stays here.
        there = self.__dict__.get("_view", (None,))[0]
        if name in self.__dict__ or hasattr(type(self), name) or not hasattr(there, name):
            super().__setattr__(name, value)
        else:
            setattr(there, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> TimmLoraModel:
        """Return a model of its own, without the adapter's handle."""
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        memo[id(self._handle)] = None
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return new

    def train(self, mode: bool = True) -> TimmLoraModel:
        """Set the mode of the model."""
        super().train(mode)
        self.base.training = mode
        return self

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return how timm groups parameters into layers, for layer decay; see `groups.group_matcher`."""
        return group_matcher(self.base, coarse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the timm model returns: logits (batch, num_classes), or a list of features."""
        return self.base(*args, **kwargs)

    # ---- the classifier ----------------------------------------------------------------------------------------------

    def get_classifier(self) -> Any:
        """Return the classifier, its trained copy: what the timm model's get_classifier returns, without PEFT's wrapper."""
        return _unwrapped(self.base.get_classifier())

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Give the model a new classifier, which is trained and saved as the old one was. Make the optimizer after this.

        Args:
            num_classes: 0 for none.
            *args, **kwargs: what the timm model's reset_classifier takes, such as global_pool.

        Raises:
            StateError: the adapter trains the classifier, and num_classes=0 would leave it none. Nothing is changed.
        """
        old = {id(self.base.get_submodule(name)) for name in classifiers(self.base)}
        wrapped = any(isinstance(m, ModulesToSaveWrapper) and id(m) in old for m in self.base.modules())
        if wrapped and num_classes == 0:
            raise StateError(
                "The adapter trains the classifier, so it can't be taken off: use forward_head(..., pre_logits=True) for "
                "features, or make the model with train_head=False."
            )
        like = next(p for p in self.base.parameters() if p.is_floating_point())
        self.base.reset_classifier(num_classes, *args, **kwargs)
        for name in classifiers(self.base):
            self.base.get_submodule(name).to(like.device)
        if wrapped:
            self.adapter.rewrap_trained()
        else:
            for name in classifiers(self.base):
                self.base.get_submodule(name).requires_grad_(False)

    # ---- saving, merging ---------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the adapter as a PEFT checkpoint folder, with what is needed to build the model again."""
        return self.adapter.save(path)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        model: str | nn.Module | None = None,
        *,
        pretrained: bool = True,
        checkpoint: str | None = None,
        quantization: Any = None,
        adapter_name: str = "default",
        revision: str | None = None,
        **timm_kwargs: Any,
    ) -> TimmLoraModel:
        """Return the model that `save` was called on.

        Args:
            path: the adapter's folder, or its name on the Hub.
            model: its base: a timm model, or a name as for `lora_adapters.load`; None takes the one the adapter's config
                names, which it does where the base came with weights.
            pretrained, checkpoint: where the base's weights come from, as for `lora_adapters.load`.
            quantization: how to store the base.
            adapter_name: name the adapter gets here.
            revision: of the adapter on the Hub.
            **timm_kwargs: override the arguments that the file holds.

        Raises:
            CheckpointError: the file is damaged, for another model, or names no base and none is given.
        """
        folder = resolve_adapter_path(path, revision)
        if isinstance(model, nn.Module):
            base = _base(model, False, checkpoint, timm_kwargs)
            if quantization is not None:
                quantize(base, make_plan(base, AttachRequest.make(quantization=quantization)))
        else:
            file = inspect_adapter(folder)
            name = model or loading.base_of(file, pretrained and checkpoint is None)
            source: dict[str, Any] = {"revision": None, "trust_remote_code": False}
            options = loading.adapter_options(name, file, **source, checkpoint=checkpoint, **timm_kwargs)
            how: dict[str, Any] = {"dtype": "auto", "device": "cpu", "quantization": quantization}
            base = loading.load(name, pretrained=pretrained, **how, **source, **options)
        adapter = lora_adapters.restore(base, folder, adapter_name=adapter_name)
        new = cls.__new__(cls)
        new._become(base, adapter)
        return new

    def merge(self, unload: bool = False) -> nn.Module:
        """Fold the adapter into the base weights; see `Adapter.merge`. With unload=True the timm model is plain again."""
        return self.adapter.merge(unload=unload)

    def save_merged(self, path: str | Path) -> Path:
        """Write a plain timm model with the adapter in it: a folder with model.safetensors and timm's config.json.

        `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, and so does `timm.create_model(name,
        num_classes=n, checkpoint_path="FOLDER/model.safetensors")`, with the outputs that this model has. Quantized weights
        become dense ones in the dtype they compute in. The model stays as it is.

        Args:
            path: a folder that does not exist yet, or is empty.

        Raises:
            RequestError: the folder is not free. MergeError: the result would not be finite.
        """
        adapter = self._handle
        merging = adapter is not None and not adapter._merged_away and not adapter.merged
        if merging:
            adapter.merge()
        try:
            return write_merged(self.base, own_keys.plain_state(self.base), Path(path))
        finally:
            if merging:
                adapter.unmerge()


def _base(source: str | nn.Module, pretrained: bool, checkpoint: str | None, arguments: Mapping[str, Any]) -> Any:
    """Return the timm model, with a note of how it was made."""
    if isinstance(source, nn.Module):
        if isinstance(source, TimmLoraModel):
            raise RequestError("This is a TimmLoraModel already. Attach another adapter to its .base.")
        extra = {key: value for key, value in arguments.items() if key != "num_classes"}
        if pretrained or checkpoint is not None or extra:
            what = ", ".join([*(["pretrained"] if pretrained else []), *(["checkpoint"] if checkpoint else []), *extra])
            raise RequestError(
                f"{what}: a model that is made already takes no arguments to make it. Give its name instead."
            )
        base = unwrap(source)
        if (backend := backend_for(base)[0].name) != "timm":
            raise RequestError(
                f"{type(base).__name__} is no timm model (the backend {backend!r} serves it): use lora_adapters.attach."
            )
        return base
    pretrained = pretrained or checkpoint is not None or is_folder(source)
    return create(source, pretrained=pretrained, checkpoint=checkpoint, **arguments)


def _unwrapped(found: Any) -> Any:
    if isinstance(found, (tuple, list, nn.ModuleList)):
        parts = [_unwrapped(part) for part in found]
        return parts if not isinstance(found, tuple) else tuple(parts)
    if isinstance(found, ModulesToSaveWrapper):
        names = found.active_adapters
        return found.modules_to_save[names[0]] if names and not found.disable_adapters else found.original_module
    return found


def _to_own(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    own_keys.to_own(module, state, prefix, module._view[1])


def _from_own(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    own_keys.from_own(module, state, prefix, module._view[1])
    own_keys.check_quantized(module, state, prefix)


def _forgive_missing(module: Any, incompatible: Any) -> None:
    """A plain timm checkpoint lacks the whole adapter, and that is no mistake."""
    missing = incompatible.missing_keys
    lacking = [key for key in missing if key not in own_keys.without_adapter_keys(missing)]
    all_of_them = [name for name, _ in module.named_parameters() if ".lora_" in name]
    if len(lacking) == len(all_of_them):
        missing[:] = own_keys.without_adapter_keys(missing)
