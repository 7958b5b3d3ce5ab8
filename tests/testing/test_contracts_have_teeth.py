"""The contracts fail for plugins that are wrong, and each fault is caught by the test that is about it."""

import pytest
import torch
from torch import nn

from lora_adapters.generic import GenericBackend
from lora_adapters.targets import Classification
from lora_adapters.testing import BackendContract, QuantizerContract, TinyText
from lora_adapters.weights import Nf4

pytest.importorskip("bitsandbytes")


class WrongSize(Nf4):
    def nbytes(self, shape):
        return super().nbytes(shape) + 1


class TakesAnything(Nf4):
    def supports(self, module):
        return super().supports(module) if type(module).__name__ != "Scaled" else ""

    def quantize(self, module, compute_dtype):
        return nn.Linear(1, 1)


class Views(Nf4):
    """Its read() returns the same tensor every time."""

    def store(self, module):
        store = super().store(module)
        if store is not None:
            kept = vars(module).setdefault("_kept", store.read())
            store.read = lambda dtype=None: kept if dtype is None else kept.to(dtype)
        return store


class Claims(Nf4):
    def store(self, module):
        return (
            super().store(Nf4().quantize(module, torch.float32)) if type(module) is nn.Linear else super().store(module)
        )


def quantizer_case(cls, **settings):
    fields = {"make_quantizer": lambda self: cls(), "max_relative_error": 0.17, "requantize_error": 0.01, **settings}
    return type("Case", (QuantizerContract,), fields)()


@pytest.mark.parametrize(
    ("cls", "settings", "test", "message"),
    [
        (WrongSize, {}, "test_sizes", "nbytes"),
        (TakesAnything, {}, "test_what_supports_refuses_is_refused", "refuse it|should raise"),
        (Views, {}, "test_read", "changed the stored weight"),
        (Claims, {}, "test_store_knows_its_own_modules_only", "must return None for a dense"),
        (Nf4, {"max_relative_error": 0.01}, "test_read", "is off by"),
        (Nf4, {"requantize_error": 0.0}, "test_quantizing_again_changes_nothing", "Quantizing"),
        (WrongSize, {}, "test_it_is_found_by_name", "leads to a Nf4"),
    ],
)
def test_a_wrong_quantizer_is_caught(cls, settings, test, message):
    with pytest.raises(AssertionError, match=message):
        getattr(quantizer_case(cls, **settings), test)()


def answering(**changes):
    class Wrong(GenericBackend):
        def classify(self, info, maps):
            right = super().classify(info, maps)
            fields = {"roles": right.roles, "never": right.never, "default": right.default}
            return Classification(**{**fields, **{key: make(right) for key, make in changes.items()}})

    return Wrong


class NewEachTime(GenericBackend):
    calls = 0

    def family(self, model):
        NewEachTime.calls += 1
        return f"family {self.calls}"


class NeedsWeights(GenericBackend):
    def family(self, model):
        return next(model.parameters()).device.type


class Missing(GenericBackend):
    def heads_to_train(self, model):
        return ("classifier",)


class NoTask(GenericBackend):
    def task_type(self, model):
        return "TELEPATHY"


@pytest.mark.parametrize(
    ("cls", "test", "message"),
    [
        (NewEachTime, "test_classification_is_the_same_every_time_and_without_weights", "second call"),
        (NeedsWeights, "test_classification_is_the_same_every_time_and_without_weights", "meta device"),
        (answering(roles=lambda c: {"q": "query"}), "test_roles_are_known_and_belong_to_layers", "'query'"),
        (answering(roles=lambda c: {"nowhere": "q"}), "test_roles_are_known_and_belong_to_layers", "no layer"),
        (answering(roles=lambda c: {}), "test_every_layer_is_answered", "embedding"),
        (answering(default=lambda c: "q+kwery"), "test_default_targets_are_layers_and_no_heads", "kwery"),
        (Missing, "test_heads_to_train_are_modules", "'classifier'"),
        (NoTask, "test_task_type_is_one_of_pefts", "TELEPATHY"),
        (NoTask, "test_attach_finds_this_backend", "GenericBackend"),
    ],
)
def test_a_wrong_backend_is_caught(cls, test, message):
    fields = {"make_backend": lambda self: cls(), "make_model": lambda self: TinyText()}
    with pytest.raises(AssertionError, match=message):
        getattr(type("Case", (BackendContract,), fields)(), test)()
