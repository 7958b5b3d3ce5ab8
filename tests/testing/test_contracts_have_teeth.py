"""The contracts fail for plugins that are wrong, and each fault is caught by the test that is about it."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from lora_adapters.generic import GenericBackend
from lora_adapters.hooks.manager import plugins
from lora_adapters.targets import Classification
from lora_adapters.testing import BackendContract, QuantizerContract, TinyText, TrainerContract
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


# ---- tasks: the example's, made wrong in the processes of the commands by what FAULT says --------------------------

FAULTY_TASK = """
import os
from typing import Literal

import torch
from lora_adapters_example import runner
from lora_adapters_example.recipe import MixerRecipe

FAULT = os.environ.get("FAULT", "")


class FaultyRecipe(MixerRecipe):
    task: Literal["faulty"]


class FaultyRunner(runner.MixerRunner):
    def check(self, parts=("train", "eval")):
        if FAULT == "checks while it trains":
            return
        super().check(parts)

    def train(self, run):
        if FAULT == "checks while it trains":
            super().check()
        if FAULT == "deaf":
            run.stop.__exit__()
            run.stop._asked = lambda *_: None
            run.stop.__enter__()
        super().train(run)

    def memory(self, plan, *arguments, **options):
        made = super().memory(plan, *arguments, **options)
        return type(made)(**{**vars(made), "total": made.total + os.getpid()}) if FAULT == "guesses" else made

    def evaluate(self, adapters, progress):
        if FAULT == "measures other rows":
            self.eval_images = self.train_images
        return super().evaluate(adapters, progress)

    def generate(self, adapters, prompts, progress, **options):
        raise NotImplementedError if FAULT == "crashes" else RuntimeError(FAULT)


faults = {
    "forgets the random state": ("write_state", lambda state: None),
    "never completes a checkpoint": ("keep_checkpoint", lambda run, folder: None),
    "does not look at the base": ("record_before", lambda run, measured, samples: None),
}
if FAULT in faults:
    setattr(runner, *faults[FAULT])
if FAULT == "forgets the optimizer":
    torch.optim.AdamW.load_state_dict = lambda self, state: None
if FAULT == "trusts every gradient":
    runner.GradientGuard.passes = lambda self, parameters, step: True
    runner.GradientGuard.holds = lambda self, parameters, step: True
if FAULT == "writes some steps":
    runner.Steps.log = lambda self, step, values, log=runner.Steps.log: step % 2 and log(self, step, values)
"""

PLUGIN = """
from lora_adapters import hookimpl
from lora_adapters.hooks.specs import TrainerSpec


@hookimpl
def lora_adapters_trainers():
    return [TrainerSpec("faulty", "Faulty.", "faulty_task:FaultyRecipe", "faulty_task:FaultyRunner")]
"""


class FaultyContract(TrainerContract):
    def make_recipe(self, folder):
        import numpy as np
        from lora_adapters_example.models import Mixer

        torch.manual_seed(0)
        Mixer(patches=4, values=4, classes=3).save(folder)
        images = np.random.default_rng(0).random((60, 4, 4))
        images[np.arange(60), 0, np.arange(60) % 3] += 2
        np.savez(folder / "dots.npz", images=images, labels=np.arange(60) % 3)
        return {
            "task": "faulty",
            "model": {"name": str(folder), "device": "cpu"},
            "adapter": {"rank": 2, "dropout": 0.2},
            "data": {"train": str(folder / "dots.npz"), "eval_fraction": 0.2},
            "training": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2},
        }


@pytest.fixture(scope="module")
def faulty_distribution(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    info = folder / "faulty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lora_adapters]\nfaulty = faulty_plugin\n")
    (folder / "faulty_plugin.py").write_text(PLUGIN)
    (folder / "faulty_task.py").write_text(FAULTY_TASK)
    return folder


@pytest.fixture
def faulty(faulty_distribution, monkeypatch):
    """Make the task known here, and to the processes of the commands."""
    monkeypatch.syspath_prepend(faulty_distribution)
    path = os.pathsep.join([str(faulty_distribution), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.delenv("FAULT", raising=False)
    plugins.cache_clear()


#: Tests that look at the run that was left alone: for these it is made with the fault.
WHOLE = ("test_a_run_says_all_there_is_to_say", "test_metrics_hold_every_step")
EXACT = "test_a_run_that_is_killed_and_stopped_goes_on_exactly"


@pytest.mark.skipif(find_spec("lora_adapters_example") is None, reason="needs the example plugin")
@pytest.mark.parametrize(
    ("fault", "test", "message"),
    [
        ("does not look at the base", "test_a_run_says_all_there_is_to_say", "no metrics of the base"),
        ("writes some steps", "test_metrics_hold_every_step", "lacks steps"),
        ("guesses", "test_the_plan_is_that_of_the_run", "other memory"),
        ("measures other rows", "test_eval_agrees_with_the_run", "eval finds"),
        ("crashes", "test_generate_answers_or_says_why_not", "One line should say"),
        ("checks while it trains", "test_wrong_recipes_are_refused_before_anything_is_written", "folder was made"),
        ("never completes a checkpoint", EXACT, "no whole checkpoint"),
        ("forgets the random state", EXACT, "differs"),
        ("forgets the optimizer", EXACT, "differs"),
        ("deaf", EXACT, "SIGINT at step"),
        ("trusts every gradient", "test_divergence_stops_the_run_and_keeps_a_finite_adapter", "The run is failed"),
    ],
)
def test_a_wrong_task_is_caught(faulty, monkeypatch, fault, test, message):
    case = (type("Case", (FaultyContract,), {}) if test in WHOLE else FaultyContract)()
    if test not in WHOLE:
        case.test_a_run_says_all_there_is_to_say()  # the run that is left alone, without a fault
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(AssertionError, match=message):
        getattr(case, test)()
