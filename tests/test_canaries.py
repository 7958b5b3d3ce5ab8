"""One test for each private or undocumented name of peft, transformers and bitsandbytes that the code relies on.

When one fails after an upgrade, the code falls back to the parent's behaviour and says so; this test says where to look.
"""

import pytest
import torch
from helpers import llama, net, state
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_adapters as la
from lora_adapters import inject
from lora_adapters.layers import BUILTIN_LAYERS
from lora_adapters.layers.engine import EngineLayer
from lora_adapters.layers.fused import FusedForward


def test_dummy_target_modules_still_means_inject_nothing():
    from peft.utils.constants import DUMMY_TARGET_MODULES

    model = net()
    get_peft_model(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES))
    assert not [m for m in model.modules() if hasattr(m, "lora_A")]
    assert not any(p.requires_grad for p in model.parameters())


def test_without_the_dummy_value_pefts_own_injection_serves(monkeypatch):
    monkeypatch.setattr(inject, "DUMMY_TARGET_MODULES", None)
    model, x = net(), torch.arange(14).view(2, 7)
    output = model(x)
    with pytest.warns(la.errors.LoraAdaptersWarning, match="PEFT's own injection"):
        adapter = la.attach(model, rank=4)
    assert len(adapter.layers) == 7
    torch.testing.assert_close(model(x), output)


@pytest.mark.parametrize("spec", BUILTIN_LAYERS, ids=lambda s: s.base)
def test_our_layers_are_laid_out_like_pefts(spec):
    """A stock layer can become ours by setting __class__, so both must have one memory layout."""
    from lora_adapters.hooks.manager import load_object

    ours = load_object(spec.layer)
    peft_class = next(c for c in ours.__bases__ if c.__module__.startswith("peft."))
    layer = peft_class.__new__(peft_class)
    nn.Module.__init__(layer)
    layer.__class__ = ours
    assert isinstance(layer, EngineLayer)
    assert ours.__name__ == peft_class.__name__
    assert ours.forward is FusedForward.forward


@pytest.mark.parametrize("kind", ["layer.Linear", "layer.Embedding", "layer.Conv1d", "layer.Conv2d"])
def test_optimized_layers_are_laid_out_like_pefts(kind):
    _check_layout(f"peft.tuners.lora.{kind}")


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_optimized_bitsandbytes_layers_are_laid_out_like_pefts(kind):
    _check_layout(f"peft.tuners.lora.bnb.{kind}")


def _check_layout(path):
    from importlib import import_module

    from lora_adapters.layers.optimized import optimized_class, stock_class

    module, _, name = path.rpartition(".")
    stock = getattr(import_module(module), name)
    ours = optimized_class(stock)
    assert (ours.__name__, stock_class(ours)) == (name, stock)
    layer = stock.__new__(stock)
    nn.Module.__init__(layer)
    layer.__class__ = ours
    layer.__class__ = stock
    # Nothing of PEFT's is overridden but forward, by name or by accident.
    mine = [cls for cls in ours.__mro__ if issubclass(cls, FusedForward)]
    names = {name for cls in mine for name in vars(cls) if not name.startswith("__") and name != "_abc_impl"}
    assert {name for name in names if hasattr(stock, name)} == {"forward"}


def test_every_way_to_add_layers_ends_in_one_method(monkeypatch, tmp_path):
    """`optimize` covers later adapters by wrapping it."""
    from peft import PeftModel, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTuner

    got = []
    stock = BaseTuner.inject_adapter
    monkeypatch.setattr(
        BaseTuner, "inject_adapter", lambda self, model, *a, **k: (stock(self, model, *a, **k), got.append(model))[0]
    )
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(llama(), config)
    model.add_adapter("second", config)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "third")
    assert got == [model.get_base_model()] * 4
    got.clear()
    base = llama()
    inject_adapter_in_model(config, base)
    assert got == [base]
    got.clear()
    base = llama()
    PeftModel.from_pretrained(base, str(tmp_path))
    assert got == [base]


@pytest.mark.parametrize("targets", ["all-linear", "conv", "embedding"])
def test_our_layers_carry_every_attribute_that_pefts_carry(targets):
    theirs, ours = net(width=32), net(width=32)
    la.attach(ours, rank=4, targets=targets)
    names = [layer.name for layer in la.plan(net(), rank=4, targets=targets).layers]
    get_peft_model(theirs, LoraConfig(r=4, target_modules=names))
    for name in names:
        peft_layer, layer = theirs.get_submodule(name), ours.get_submodule(name)
        missing = set(vars(peft_layer)) - set(vars(layer)) - {"conv_fn", "kwargs"}
        assert not missing, missing
        assert peft_layer._modules.keys() == layer._modules.keys()
        assert repr(peft_layer).splitlines()[0] == repr(layer).splitlines()[0]


def test_state_dict_keys_are_pefts():
    theirs, ours = llama(), llama()
    la.attach(ours, rank=4, targets="attention")
    get_peft_model(theirs, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert state(ours)["flags"] == state(theirs)["flags"]


def test_transformers_says_which_weights_are_tied():
    model = llama(tie_word_embeddings=True)
    ties = {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.get_expanded_tied_weights_keys(all_submodels=False) == model.all_tied_weights_keys == ties
    model._tied_weights_keys = {}
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.tie_weights()
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_without_the_names_of_ties_merging_says_so(monkeypatch):
    from lora_adapters_transformers import tying

    monkeypatch.setattr(tying, "_NAMES", ("no_such_name",))
    adapter = la.attach(llama(tie_word_embeddings=True), rank=2, targets=["lm_head"])
    with pytest.warns(la.errors.LoraAdaptersWarning, match="lacks no_such_name.*may tie them again"):
        adapter.merge(unload=True)
