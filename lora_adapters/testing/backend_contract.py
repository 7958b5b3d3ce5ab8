"""What every backend must do, as tests a plugin author inherits."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..api import attach, plan, restore
from ..backends import backend_for
from ..hooks.manager import plugins
from ..hooks.specs import ROLES
from ..planning import make_plan
from ..request import AttachRequest
from ..targets import Backend, Classification, ModelInfo, candidates, expand
from ..weights import layer_kind
from .checks import difference, floats, meta_copy, refused, state_of, train


class BackendContract:
    """Subclass it in a test file, name the subclass Test..., and say how to make your backend and a model of yours.

    The model should be as small as your framework allows, on the CPU, with weights. The plugin must be installed (or
    registered with `lora_adapters.hooks.manager.plugins().register(module, name)`), since `attach` has to find it.
    """

    def make_backend(self) -> Backend:
        """Return your backend."""
        raise NotImplementedError("BackendContract: define make_backend(self) and return your backend.")

    def make_model(self) -> nn.Module:
        """Return a new small model that your backend serves."""
        raise NotImplementedError("BackendContract: define make_model(self) and return a small model of yours.")

    def make_inputs(self, model: nn.Module, batch_size: int) -> dict[str, Any]:
        """Return keyword arguments of the model's forward. Override it only if your backend can't know them."""
        return self.make_backend().example_inputs(model, batch_size, 8, "cpu")

    def loss(self, result: Any) -> torch.Tensor:
        """Return the scalar to train on: the result's `.loss`, else the mean square of its first floating tensor."""
        own = getattr(result, "loss", None)
        if isinstance(own, torch.Tensor):
            return own
        first = next(t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point())
        return first.float().square().mean()

    # ---- what it says about a model ------------------------------------------------------------------------------

    def test_attach_finds_this_backend(self) -> None:
        """attach chooses this backend for the model."""
        mine, found = self.make_backend(), backend_for(self.make_model())[0]
        assert type(found) is type(mine), (
            f"attach would use {type(found).__name__} for this model and not {type(mine).__name__}: is the plugin "
            "installed, and does its BackendSpec name the package that the model's class lives in?"
        )
        assert found.name == mine.name != "", "A backend needs a name."

    def test_classification_is_the_same_every_time_and_without_weights(self) -> None:
        """Family and roles are deterministic and need no weights."""
        model = self.make_model()
        family, classes = self._classify(model)
        assert isinstance(family, str), f"family must be a str, got {family!r}."
        assert family, "family must not be empty: TargetMap.families has to name it."
        assert (family, classes) == self._classify(model), "A second call classifies the same model differently."
        assert (family, classes) == self._classify(meta_copy(model)), "On the meta device the answer differs."

    def test_roles_are_known_and_belong_to_layers(self) -> None:
        """Every role is one of ROLES, and every name a layer."""
        model = self.make_model()
        layers, classes = candidates(model), self._classify(model)[1]
        for name, role in classes.roles.items():
            assert role in ROLES, f"{name!r} has role {role!r}; roles are {', '.join(ROLES)}."
        for name in (*classes.roles, *classes.never):
            assert name in layers, f"{name!r} has a role, but is no layer that could carry an adapter."
        assert all(classes.never.values()), "Every entry of `never` needs a reason; the plan shows it."

    def test_every_layer_is_answered(self) -> None:
        """Every convolution and embedding has a role."""
        # A layer without a role counts as "other", which "all-linear" takes: right for linear layers only.
        model = self.make_model()
        classes = self._classify(model)[1]
        for name, module in candidates(model).items():
            kind = layer_kind(module)
            answered = name in classes.roles or name in classes.never or kind == "linear"
            assert answered, f"{name!r} ({kind}) has no role: 'all-linear' would adapt it."

    def test_default_targets_are_layers_and_no_heads(self) -> None:
        """targets='auto' selects layers, heads not among them."""
        model = self.make_model()
        default = self._classify(model)[1].default
        assert default, "The classification has no default: say in a TargetMap what targets='auto' means."
        for word in default.split("+"):
            assert expand(word.strip()), f"The default {default!r} holds {word!r}, which is no role."
        made = plan(model, rank=1)
        assert made.layers, f"The default {default!r} selects no layer."
        heads = [layer.name for layer in made.layers if layer.role == "head"]
        assert not heads, f"The default {default!r} adapts the head {heads[:1]}: heads are trained whole or left alone."

    def test_heads_to_train_are_modules(self) -> None:
        """heads_to_train names modules that exist."""
        model = self.make_model()
        names = self.make_backend().heads_to_train(model)
        assert isinstance(names, tuple), f"heads_to_train must return a tuple of names, got {names!r}."
        known = dict(model.named_modules())
        for name in names:
            assert name in known, f"heads_to_train names {name!r}, which is no module of the model."

    def test_task_type_is_one_of_pefts(self) -> None:
        """task_type is None or a name PEFT knows."""
        from peft import TaskType

        task = self.make_backend().task_type(self.make_model())
        known = [None, *(str(t.value) for t in TaskType)]
        assert task in known, f"task_type is {task!r}; PEFT knows {known}."

    def test_a_name_it_does_not_know_is_refused(self) -> None:
        """can_load and load refuse what is no model of theirs."""
        backend: Any = self.make_backend()
        with tempfile.TemporaryDirectory() as folder:
            assert backend.can_load(folder, revision=None) is False, "can_load must be False for an empty folder."
            with refused("Loading an empty folder"):
                options = {"dtype": torch.float32, "device": "cpu", "revision": None, "trust_remote_code": False}
                backend.load(folder, quantization=None, **options)

    # ---- what it makes of a model ----------------------------------------------------------------------------------

    def test_example_inputs_run_the_model(self) -> None:
        """example_inputs have the rows asked for and run the model."""
        model = self.make_model().eval()
        for batch_size in (1, 3):
            inputs = self.make_inputs(model, batch_size)
            tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
            assert any(t.dim() and t.shape[0] == batch_size for t in tensors), f"No input has {batch_size} rows."
            results = floats(model(**inputs))
            assert results, "The model's result holds no floating tensor."
            assert all(torch.isfinite(t).all() for t in results), "The model's result on example inputs is not finite."

    def test_attaching_changes_nothing_until_trained(self) -> None:
        """A new adapter leaves the output as it was, bit for bit."""
        model, inputs, before = self._ready()
        adapter = attach(model, rank=2, seed=0)
        self._same(floats(adapter.model(**inputs)), before, "A new adapter changes the model's output")
        assert adapter.plan.backend == self.make_backend().name

    def test_training_changes_the_adapter_only(self) -> None:
        """Training moves every adapted layer's factors and no frozen value."""
        model, inputs, before = self._ready()
        adapter = attach(model, rank=2, seed=0)
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        train(adapter.model, inputs, self.loss, steps=3)
        now = {name: p.detach() for name, p in model.named_parameters()}
        assert not (what := difference(frozen, {n: now[n] for n in frozen})), f"Training changed the frozen {what}."
        still = [n for n in start if ".lora_B." in n and torch.equal(start[n], now[n])]
        assert not still, (
            f"{len(still)} of the planned layers were not trained, first {still[:1]}: does forward use it?"
        )
        moved = any(not torch.equal(a, b) for a, b in zip(floats(adapter.model(**inputs)), before, strict=True))
        assert moved, "Training changed no output of the model."

    def test_saved_and_restored_adapters_compute_the_same(self) -> None:
        """A restored adapter gives the same output, bit for bit."""
        model, inputs, _ = self._ready()
        twin = copy.deepcopy(model)
        adapter = attach(model, rank=2, seed=0)
        train(adapter.model, inputs, self.loss, steps=3)
        with tempfile.TemporaryDirectory() as folder:
            adapter.save(folder)
            restored = restore(twin, folder)
        self._same(floats(restored.model(**inputs)), floats(adapter.model(**inputs)), "The restored adapter differs")

    def test_detaching_gives_the_model_back(self) -> None:
        """detach gives back the same modules and bits."""
        model, inputs, before = self._ready()
        values, modules = state_of(model), {name: id(module) for name, module in model.named_modules()}
        adapter = attach(model, rank=2, seed=0)
        train(adapter.model, inputs, self.loss, steps=1)
        adapter.detach()
        assert not (what := difference(values, state_of(model))), f"After detach {what} differs."
        assert modules == {name: id(module) for name, module in model.named_modules()}, "After detach a module differs."
        self._same(floats(model(**inputs)), before, "After detach the output differs")

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def _classify(self, model: nn.Module) -> tuple[str, Classification]:
        backend = self.make_backend()
        family = backend.family(model)
        info = ModelInfo(backend.name, family, candidates(model), model)
        return family, backend.classify(info, plugins().target_maps())

    def _ready(self) -> tuple[nn.Module, dict[str, Any], list[torch.Tensor]]:
        """Return a model in eval mode (no dropout, fixed normalisation statistics), inputs, and its result on them."""
        torch.manual_seed(0)
        model = self.make_model().eval()
        make_plan(model, AttachRequest.make(rank=2))
        inputs = self.make_inputs(model, 2)
        return model, inputs, floats(model(**inputs))

    @staticmethod
    def _same(now: list[torch.Tensor], before: list[torch.Tensor], what: str) -> None:
        assert len(now) == len(before), f"{what}: another number of tensors."
        for new, old in zip(now, before, strict=True):
            assert torch.equal(new, old), f"{what}: by {(new.float() - old.float()).abs().max().item():g} at most."
