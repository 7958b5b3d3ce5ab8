"""The handle a user keeps of one attached adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer

from . import batch_norm, inject, merge, wrappers
from .attach_plan import AttachPlan
from .errors import RequestError, StateError
from .hooks.manager import plugins
from .norms import update_norm
from .quantized import unpack_read
from .saving import save_adapter
from .snapshot import Changes

if TYPE_CHECKING:
    from torch import nn

    from .targets import Kernels


class _State:
    """What is known of one base model: its PeftModel, its adapters in the order they came, and how to take them off.

    Also the names of the modules whose weight other code reads, which must never be left packed without an adapter.

    It is kept on the model itself and goes with it. (A dictionary that is weak in its keys would keep every model
    alive: the PeftModel holds its base.) A copy of a model begins with nothing known, as a model from elsewhere does.
    """

    _NAME = "_lora_adapters_state"

    def __init__(self, peft_model: PeftModel) -> None:
        self.peft_model = peft_model
        self.adapters: dict[str, Adapter] = {}
        self.changes: list[Changes] = []
        self.read: set[str] = set()
        # The base's own modules under those trained whole, by name: whoever replaces one takes the wrapper away too.
        self.originals: dict[str, nn.Module] = {}
        self.marks = Changes()

    @classmethod
    def of(cls, base: nn.Module) -> _State | None:
        return vars(base).get(cls._NAME)

    def keep_on(self, base: nn.Module) -> None:
        vars(base)[self._NAME] = self

    @classmethod
    def forget(cls, base: nn.Module) -> None:
        vars(base).pop(cls._NAME, None)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def peft_model_of(base: nn.Module) -> PeftModel | None:
    """Return the PeftModel that earlier calls put around `base`, or None.

    Raises:
        StateError: a module that one of its adapters trains was replaced, so that another can't come beside it.
    """
    state = _State.of(base)
    if state is None:
        return None
    left = sorted(inject.adapter_names(base))
    if not left:
        # Other code has taken every adapter off (diffusers' unload_lora_weights, say): nothing is left to take back.
        state.marks.revert()
        _State.forget(base)
        return None
    state.adapters = {name: adapter for name, adapter in state.adapters.items() if name in left}
    if state.peft_model.active_adapter not in left:
        # Other code has deleted it from the layers (diffusers' delete_adapters), which tells PEFT's model nothing.
        state.peft_model.active_adapter = left[0]
    for adapter in state.adapters.values():
        wrappers.refuse_replaced(base, adapter.plan)
    return state.peft_model


class Adapter:
    """One attached adapter. Made by `attach` and `restore`.

    Attributes:
        name: the adapter's name.
        model: the `peft.PeftModel` around the base model; give this one to Trainer and other tools.
        plan: what was attached.
    """

    def __init__(
        self,
        base: nn.Module,
        peft_model: PeftModel,
        plan: AttachPlan,
        changes: Changes,
        kernels: Kernels | None = None,
    ) -> None:
        self.name = plan.request.adapter_name
        self.plan = plan
        self._base: nn.Module | None = base
        self._merged_away = False
        self._kernels = kernels
        state = _State.of(base)
        if state is None or state.peft_model is not peft_model:
            state = _State(peft_model)
            state.keep_on(base)
        state.adapters[self.name] = self
        state.changes.append(changes)
        state.read |= {layer.name for layer in plan.layers if layer.read_by}
        # What trains beside whole modules: biases.
        self._other_values = plan.trained_parameters - wrappers.trained_values(base, plan)
        state.originals = wrappers.wrapped_originals(base) | state.originals

    def __repr__(self) -> str:
        state = "merged into its base" if self._merged_away else "detached" if self._base is None else "attached"
        return f"<Adapter {self.name!r}, {len(self.plan.layers)} layers, {state}>"

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def base(self) -> nn.Module:
        """Return the adapted base model."""
        if self._base is None:
            how = "merged into its base and unloaded" if self._merged_away else "detached"
            raise StateError(f"Adapter {self.name!r} was {how}: attach or restore it again.")
        return self._base

    @property
    def _state(self) -> _State:
        state = _State.of(self.base)
        if state is None or self.name not in state.adapters:
            raise StateError(
                f"Adapter {self.name!r} is unknown to its base: the model was copied or rebuilt, or other code took the "
                "adapter off."
            )
        return state

    @property
    def model(self) -> PeftModel:
        """Return the PeftModel over the same modules."""
        return self._state.peft_model

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """Return module name -> adapter layer."""
        return {layer.name: self.base.get_submodule(layer.name) for layer in self.plan.layers}  # type: ignore[misc]

    def rewrap_trained(self) -> tuple[str, ...]:
        """Bring modules that replaced trained ones (a head, by `model.reset_classifier(n)`) under the adapter.

        The new module itself is trained and saved from now on; other adapters that train the same module get copies of it.
        The plans then count its values. Make the optimizer afterwards: it does not know the new parameters. The base's own
        module stays what it was: `disabled()` computes with it, and `detach` puts it back.

        Returns:
            The names of the modules that had been replaced; () if none was.

        Raises:
            StateError: the adapter is not attached, or is merged.
        """
        if self.merged:
            raise StateError("The adapter is merged into the base: unmerge it first.")
        state, base = self._state, self.base
        names = tuple(wrappers.replaced(base, self.plan))
        for name in names:
            # An adapter that also trains the module has lost it by the same call.
            holders = [a.name for a in state.adapters.values() if name in wrappers.replaced(base, a.plan)]
            wrappers.rewrap(base, [name], state.originals, holders, self.model.active_adapters)
        for adapter in state.adapters.values():
            values = adapter._other_values + wrappers.trained_values(base, adapter.plan)
            adapter.plan = replace(adapter.plan, trained_parameters=values)
        return names

    @property
    def merged(self) -> bool:
        """Return True while this adapter is folded into the base."""
        # A layer that other code replaced is merged into nothing.
        return any(self.name in getattr(layer, "merged_adapters", ()) for layer in self.layers.values())

    def summary(self) -> str:
        """Return a table of what is adapted, how each layer computes now and why, what is skipped and why."""
        from .report.plan_table import render

        return render(self.plan, inject.routes(self.base, self.plan))

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Iterate over the parameters that this adapter trains."""
        return (p for p in self.base.parameters() if p.requires_grad)

    def norms(self) -> dict[str, float]:
        """Return the mean Frobenius norm of scaling * B @ A over all layers and its largest value."""
        norms = [_norm(layer, self.name) for layer in self.layers.values()]
        values = torch.stack(norms)
        return {"mean": values.mean().item(), "max": values.max().item()}

    def mark(self, attribute: str, value: Any) -> None:
        """Set an attribute of the base that its framework looks for; it goes when the last adapter leaves the base.

        For plugins, in the hook `lora_adapters_attached`.
        """
        self._state.marks.record(self.base, attribute)
        vars(self.base)[attribute] = value

    # ---- switching ---------------------------------------------------------------------------------------------------

    @contextmanager
    def disabled(self) -> Iterator[PeftModel]:
        """Within this context the model computes as if no adapter were attached."""
        with self.model.disable_adapter():
            yield self.model

    def scale(self, factor: float) -> None:
        """Set this adapter's strength: its scaling becomes the planned one times `factor`."""
        if self.merged:
            raise StateError("The adapter is merged: unmerge it before changing its scale.")
        from .request import check_alpha

        check_alpha(factor, "factor")
        layers = self.layers
        for planned in self.plan.layers:
            layers[planned.name].scaling[self.name] = planned.scaling * factor

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the adapter as a PEFT checkpoint folder: adapter_config.json and adapter_model.safetensors.

        The files are staged and put in place as one act: an interrupted save leaves the earlier checkpoint as it was.

        Args:
            path: folder; made if missing. Other files in it stay.

        Returns:
            The folder.

        Raises:
            StateError: the adapter is merged, or a module that it adapts or trains was replaced after attaching.
        """
        if self.merged:
            raise StateError("The adapter is merged into the base: unmerge it before saving.")
        wrappers.check_in_place(self.base, self.plan)
        metadata: dict[str, Any] = {}
        plugins().notify("lora_adapters_saving", adapter=self, path=str(path), metadata=metadata)
        return save_adapter(self.model, self.plan, Path(path), metadata)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
    ) -> str:
        """Save to a temporary folder and upload it to the Hub.

        Args:
            repo_id: "name/repo"; created if missing.
            private: make a new repository private.
            token: Hub token; None takes the one of the login.
            options: passed to `huggingface_hub.HfApi.upload_folder`: revision, commit_message, create_pr, ...

        Returns:
            The commit's address.

        Raises:
            HubError: no token, no permission, or the Hub can't be reached.
        """
        import tempfile

        from .hub import plan_upload, upload

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            return upload(plan_upload(folder), repo_id, private=private, token=token, **options)

    # ---- merging and leaving -----------------------------------------------------------------------------------------

    def merge(self, unload: bool = False) -> nn.Module:
        """Fold the adapter into the base weights: all layers or none.

        A quantized base layer becomes a dense one in its compute dtype, since quantizing the sum again would lose most
        of a small update. The old modules are kept aside for `unmerge`; with `unload=True` they are let go.

        Args:
            unload: also remove the adapter layers, which gives back a plain model at the base's own speed.

        Returns:
            The base model.

        Raises:
            MergeError: the result would not be finite. Nothing is merged then.
        """
        if self.merged and not unload:
            raise StateError(f"Adapter {self.name!r} is merged already.")
        base = self.base
        merge.merge(self.model, base, [self.name])
        if unload:
            others = [name for name in inject.adapter_names(base) if name != self.name]
            if others:
                merge.unmerge(self.layers.values())
                raise RequestError(
                    f"The model also carries {', '.join(map(repr, sorted(others)))}: unloading would drop them. "
                    "Detach them first; `adapter.model.delete_adapter(name)` drops one that another tool added."
                )
            merge.unload(self.model)
            self._release_kernels()
            self._state.changes.clear()
            self._state.marks.revert()
            _State.forget(base)
            self._base, self._merged_away = None, True
        plugins().notify("lora_adapters_merged", adapter=self, unload=unload)
        return base

    def unmerge(self) -> None:
        """Give the base its own modules back, bit for bit."""
        if not self.merged:
            raise StateError(f"Adapter {self.name!r} is not merged.")
        merge.unmerge(self.layers.values())

    def detach(self) -> nn.Module:
        """Take the adapter off and give the model its original modules back, bit for bit.

        A base that `attach` quantized stays quantized: its dense weights were let go. Where other code reads such a
        weight without calling its module, the module becomes a dense one with the dequantized weight, and a warning
        says so. Liger's kernels go with the last adapter that asked for them.

        Returns:
            The base model.
        """
        base, state = self.base, self._state
        if self.merged:
            self.unmerge()
        del state.adapters[self.name]
        if inject.adapter_names(base) == {self.name}:
            state.marks.revert()
            for changes in reversed(state.changes):
                changes.revert()
            batch_norm.release(base)
            _State.forget(base)
        else:
            left = state.peft_model
            was_active = self.name in left.active_adapters
            left.delete_adapter(self.name)
            if was_active and left.active_adapters:
                # PEFT's layers go over to the next adapter, but modules trained whole do only if this one had a copy.
                left.set_adapter(left.active_adapters[0])
            inject.unwrap_empty(base)
        unpack_read(base, state.read)
        self._release_kernels()
        self._base = None
        return base

    def _release_kernels(self) -> None:
        if self._kernels is not None:
            self._kernels.revert()
            self._kernels = None


def _norm(layer: LoraLayer, name: str) -> torch.Tensor:
    if name in layer.lora_embedding_A:
        return update_norm(layer.lora_embedding_A[name], layer.lora_embedding_B[name], layer.scaling[name])
    return update_norm(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])  # type: ignore[arg-type,union-attr]
