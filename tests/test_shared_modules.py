"""One module under several names, and one weight in several modules: compared with dense weights W + sBA by hand."""

import copy

import pytest
import torch
from helpers import assert_same, perturb, state
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

import lora_adapters as la
from lora_adapters.errors import LoraAdaptersWarning, UnsupportedError
from lora_adapters.inject import base_of
from lora_adapters.sharing import held_twice, other_names
from lora_adapters.weights import store_for

WIDTH, WORDS = 64, 96


class OneModule(nn.Module):
    """A linear layer in two parents, and under two attributes of the second."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"lin": nn.Linear(WIDTH, WIDTH)})
        self.b = nn.ModuleDict({"own": nn.Linear(WIDTH, WIDTH), "lin": self.a["lin"], "again": self.a["lin"]})

    def forward(self, x):
        x = self.b["own"](torch.tanh(self.a["lin"](x)))
        return self.b["again"](torch.tanh(self.b["lin"](torch.tanh(x))))


class OneBlock(nn.Module):
    """A block in two parents: its layers have one place each, inside the block."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.layers = nn.ModuleList(nn.ModuleDict({"block": block, "own": nn.Linear(WIDTH, WIDTH)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer["own"](layer["block"](x))
        return x


class OneWeight(nn.Module):
    """Two linear layers that share their weight and not their bias, and one between them."""

    def __init__(self):
        super().__init__()
        self.first, self.own, self.second = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.own(torch.tanh(self.first(x)))))


class TiedHead(nn.Module):
    """An output layer that shares its weight with the embedding."""

    def __init__(self):
        super().__init__()
        self.emb, self.mid = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mid(self.emb(x))))


#: Model, targets, names of the layers they mean.
CASES = {
    "one module": (OneModule, "all-linear", ["a.lin", "b.own"]),
    "one block": (OneBlock, "all-linear", ["layers.0.block.0", "layers.0.own", "layers.1.own"]),
    "one weight": (OneWeight, "all-linear", ["first", "own", "second"]),
    "one weight, one end": (OneWeight, ["second"], ["second"]),
    "tied, both ends": (TiedHead, ["emb", "mid", "head"], ["emb", "mid", "head"]),
    "tied, the head": (TiedHead, ["head"], ["head"]),
    "tied, the embedding": (TiedHead, ["emb", "mid"], ["emb", "mid"]),
}
every_case = pytest.mark.parametrize("case", CASES)
#: The same LoRA layers, built by us and by PEFT's injection.
every_engine = pytest.mark.parametrize("options", [{}, {"init_lora_weights": "orthogonal"}], ids=["direct", "peft"])


def build(make, dtype=torch.float64):
    torch.manual_seed(0)
    return make().to(dtype)


def inputs(make, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    if make is TiedHead:
        return torch.randint(WORDS, (5, 7), generator=generator)
    return torch.randn(5, WIDTH, generator=generator).to(dtype)


def adapted(case, **options):
    make, targets, names = CASES[case]
    model = build(make, options.pop("dtype", torch.float64))
    adapter = la.attach(model, **{"rank": 4, "alpha": 6, "targets": targets} | options)
    assert list(adapter.layers) == names
    perturb(model)
    return model, adapter


def factors(adapter):
    """A and B of every layer, copied, as leaves that take a gradient."""
    found = {}
    for name, layer in adapter.layers.items():
        pair = layer.factor_parameters(adapter.name)
        found[name] = tuple(p.detach().clone().requires_grad_() for p in pair)
    return found


def reference(base, pairs, x, scale=1.5):
    """The output of the base model with W + scale * B @ A in place of each adapted weight."""
    weights = {}
    for name, (a, b) in pairs.items():
        module = base.get_submodule(name)
        delta = scale * b @ a
        weights[f"{name}.weight"] = module.weight.detach() + (delta.T if isinstance(module, nn.Embedding) else delta)
    return functional_call(base, weights, (x,), tie_weights=False)


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **{"rtol": 1e-9, "atol": 1e-11} | tolerance)


def lora_layers(model):
    """Every name, further names included, of what an adapter left in the model."""
    return [n for n, m in model.named_modules(remove_duplicate=False) if hasattr(m, "lora_A")]


# ---- what the adapted model computes ------------------------------------------------------------------------------


@every_engine
@every_case
def test_outputs_and_gradients_are_those_of_dense_weights(case, options):
    make, *_ = CASES[case]
    model, adapter = adapted(case, **options)
    x, pairs = inputs(make), factors(adapter)
    output, expected = model(x), reference(build(make), pairs, x)
    close(output, expected)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, layer in adapter.layers.items():
        for mine, theirs in zip(layer.factor_parameters(adapter.name), pairs[name], strict=True):
            assert theirs.grad.abs().max() > 0
            close(mine.grad, theirs.grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_engine
def test_a_shared_module_is_wrapped_once_and_stays_one_object(options):
    model, adapter = adapted("one module", **options)
    assert model.a["lin"] is model.b["lin"] is model.b["again"] is adapter.layers["a.lin"]
    assert len([m for m in model.modules() if hasattr(m, "lora_A")]) == 2
    assert any("one module in several places" in note for note in adapter.plan.notes)
    model, adapter = adapted("one block", **options)
    assert model.layers[0]["block"] is model.layers[1]["block"]
    assert not any("several places" in note for note in adapter.plan.notes)


@every_case
def test_the_plan_counts_values_once(case):
    model, adapter = adapted(case)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter.plan.trainable_parameters
    assert adapter.plan.total_parameters == sum(p.numel() for p in build(CASES[case][0]).parameters())
    meta = copy.deepcopy(build(CASES[case][0])).to("meta")
    assert la.plan(meta, rank=4, targets=CASES[case][1]).trainable_parameters == adapter.plan.trainable_parameters


# ---- merging and leaving --------------------------------------------------------------------------------------------


@every_engine
@every_case
def test_merging_and_detaching(case, options):
    make, *_ = CASES[case]
    plain, x = build(make), inputs(make)
    before = state(plain)
    model, adapter = adapted(case, **options)
    expected = reference(plain, factors(adapter), x)
    for _ in range(2):
        adapter.merge()
        close(model(x), expected)
        for name, layer in adapter.layers.items():
            assert torch.equal(layer._aside[0].weight, plain.get_submodule(name).weight)
        adapter.unmerge()
        close(model(x), expected)
    adapter.merge()
    adapter.detach()
    assert_same(model, before)
    assert other_names(model) == other_names(plain)
    assert len(list(model.parameters())) == len(list(plain.parameters()))  # what was tied is tied


@every_engine
@every_case
def test_merging_and_unloading(case, options):
    make, *_ = CASES[case]
    x = inputs(make)
    model, adapter = adapted(case, **options)
    expected = reference(build(make), factors(adapter), x)
    assert adapter.merge(unload=True) is model
    assert lora_layers(model) == []
    close(model(x), expected)
    assert other_names(model) == other_names(build(make))
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in build(make).named_modules()}


@pytest.mark.parametrize(("target", "other"), [("head", "emb"), ("emb", "head")])
def test_merging_one_end_of_a_tie_leaves_the_other_alone(target, other):
    model = build(TiedHead)
    before = model.emb.weight.detach().clone()
    adapter = la.attach(model, rank=4, targets=[target])
    perturb(model)
    adapter.merge()
    assert torch.equal(model.get_submodule(other).weight, before)
    assert not torch.allclose(model.get_submodule(target).get_base_layer().weight, before)
    adapter.unmerge()
    assert base_of(model.get_submodule(target)).weight is model.get_submodule(other).weight
    adapter.merge(unload=True)
    assert torch.equal(model.get_submodule(other).weight, before)


def test_two_adapters_on_a_shared_module():
    model, x = build(OneModule), inputs(OneModule)
    plain, before = model(x), state(model)
    first = la.attach(model, rank=2, targets=["own"], adapter_name="first")
    second = la.attach(model, rank=2, targets=["lin"], adapter_name="second")
    perturb(model)
    expected = reference(build(OneModule), factors(second), x, scale=1.0)
    close(model(x), expected)
    first.detach()
    close(model(x), expected)
    third = la.attach(model, rank=3, targets=["lin", "own"], adapter_name="third")
    assert model.a["lin"] is model.b["again"]
    second.detach()
    assert model.a["lin"] is model.b["again"]
    third.detach()
    close(model(x), plain)
    assert_same(model, before)


def test_the_last_layer_of_an_adapter_leaves_every_place():
    model = build(OneModule)
    la.attach(model, rank=2, targets=["own"], adapter_name="first")
    la.attach(model, rank=2, targets=["lin"], adapter_name="second").detach()
    assert type(model.a["lin"]) is nn.Linear
    assert model.a["lin"] is model.b["lin"] is model.b["again"]


def test_a_failed_merge_merges_none_of_them():
    _, adapter = adapted("one module")
    with torch.no_grad():
        adapter.layers["b.own"].lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(la.LoraAdaptersError, match="not finite"):
        adapter.merge()
    assert not any(layer.merged for layer in adapter.layers.values())


# ---- quantized ------------------------------------------------------------------------------------------------------


@every_case
def test_nf4_in_memory(case):
    make, *_ = CASES[case]
    model, adapter = adapted(case, quantization="nf4", dtype=torch.float32)
    x = inputs(make, torch.float32)
    dense = build(make, torch.float32)
    quantized = set(adapter.plan.quantize)
    for name in quantized:
        weight = store_for(base_of(model.get_submodule(name))).read()
        dense.get_submodule(name).weight.data.copy_(weight)
    expected = reference(dense, factors(adapter), x)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    close(model(x), expected, **tolerance)
    assert model(x).grad_fn is not None
    for _ in range(2):
        adapter.merge()
        close(model(x), expected, **tolerance)
        adapter.unmerge()
        close(model(x), expected, **tolerance)
    adapter.merge(unload=True)
    assert lora_layers(model) == []
    close(model(x), expected, **tolerance)


def test_nf4_quantizes_a_shared_module_once_and_leaves_ties_alone():
    model, adapter = adapted("one module", quantization="nf4", dtype=torch.float32)
    assert set(adapter.plan.quantize) == {"a.lin", "b.own"}
    packed = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and not hasattr(m, "lora_A")]
    assert len(packed) == 2
    adapter.detach()
    assert model.a["lin"] is model.b["lin"] is model.b["again"]
    assert type(model.a["lin"]).__name__ == "Linear4bit"

    model, adapter = adapted("tied, both ends", quantization="nf4", dtype=torch.float32)
    assert set(adapter.plan.quantize) == {"mid"}
    assert any("stay as they are, dense" in note for note in adapter.plan.notes)
    adapter.detach()
    assert model.head.weight is model.emb.weight
    assert set(la.plan(build(OneWeight, torch.float32), rank=2, quantization="nf4").quantize) == {"own"}


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*several places.*")
@every_case
def test_save_and_restore(case, tmp_path):
    make, *_ = CASES[case]
    model, adapter = adapted(case)
    adapter.save(tmp_path)
    other = build(make)
    again = la.restore(other, tmp_path)
    assert list(again.layers) == list(adapter.layers)
    close(other(inputs(make)), model(inputs(make)))


@pytest.mark.parametrize("case", [case for case in CASES if case != "one module"])
def test_stock_peft_agrees(case, tmp_path):
    make, _, names = CASES[case]
    x = inputs(make)
    model, adapter = adapted(case)
    adapter.save(tmp_path / "ours")
    close(PeftModel.from_pretrained(build(make), str(tmp_path / "ours"))(x), model(x), rtol=1e-6, atol=1e-6)

    theirs = get_peft_model(build(make), LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine = build(make)
    assert list(la.restore(mine, tmp_path / "theirs").layers) == names
    close(mine(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_what_stock_peft_would_do_to_a_shared_module_is_said_and_refused(tmp_path):
    model, adapter = adapted("one module")
    x = inputs(OneModule)
    with pytest.warns(LoraAdaptersWarning, match=r"'a.lin' is one module in several places.*lora_adapters.restore"):
        adapter.save(tmp_path / "ours")
    # If this fails, PEFT adapts all places by now, and the warning and the refusal can go.
    stock = PeftModel.from_pretrained(build(OneModule), str(tmp_path / "ours"))
    assert not torch.allclose(stock(x), model(x))
    stock.save_pretrained(str(tmp_path / "theirs"))
    mine = build(OneModule)
    before = state(mine)
    with pytest.raises(UnsupportedError, match=r"'a.lin' is one module.*PeftModel.from_pretrained"):
        la.restore(mine, tmp_path / "theirs")
    assert_same(mine, before)


def test_a_model_that_stock_peft_adapted_keeps_its_meaning():
    """PEFT wraps the first place only; an adapter of ours on top, and taking it off again, change nothing about that."""
    stock = get_peft_model(build(OneModule), LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False))
    x = inputs(OneModule)
    before = stock(x)
    adapter = la.attach(stock, rank=2, targets=["own"], adapter_name="ours")
    stock.base_model.set_adapter(["default", "ours"])
    close(stock(x), before)
    adapter.detach()
    stock.base_model.set_adapter("default")
    close(stock(x), before)


# ---- what is refused, and how it is named ---------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["b.lin"], ["again"], "re:^b.lin$", {"b.again": 3}, ["a.lin", "b.lin"]])
def test_any_of_its_names_means_the_module(targets):
    plan = la.plan(build(OneModule), rank=3, targets=targets)
    assert [layer.name for layer in plan.layers] == ["a.lin"]
    assert "a.lin" not in {x.name for x in la.plan(build(OneModule), rank=3, exclude=["b.lin"]).layers}


def test_a_shared_module_is_not_trained_whole():
    model = build(OneModule)
    before = state(model)
    for name in ("a.lin", "lin"):
        with pytest.raises(UnsupportedError, match=r"'a.lin' can't be trained whole.*3 places"):
            la.attach(model, rank=2, targets=["own"], modules_to_save=[name])
    assert_same(model, before)
    inside = build(OneBlock)
    la.attach(inside, rank=2, targets=["own"], modules_to_save=["block.0"])
    assert inside.layers[0]["block"] is inside.layers[1]["block"]


def test_an_initialisation_that_changes_the_base_is_refused_on_tied_weights():
    model = build(OneWeight, torch.float32)
    before = state(model)
    for targets in (["first"], ["own", "second"]):
        with pytest.raises(UnsupportedError, match=r"also the weight of (first|second).*'pissa' would change for both"):
            la.attach(model, rank=2, targets=targets, init_lora_weights="pissa")
    assert_same(model, before)
    x = inputs(OneWeight, torch.float32)
    output = model(x)
    adapter = la.attach(model, rank=2, init_lora_weights="pissa")  # by role: they are left out, and the plan says why
    assert list(adapter.layers) == ["own"]
    assert [layer.name for layer in adapter.plan.skipped if "'pissa' would" in layer.reason] == ["first", "second"]
    close(model(x), output, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedError, match="'pissa' would change for both"):
        la.attach(model, rank=2, targets=["first"], adapter_name="more", init_lora_weights="pissa")


def test_an_initialisation_that_changes_the_base_reaches_every_place_of_a_module():
    model, x = build(OneModule, torch.float32), inputs(OneModule, torch.float32)
    output, before = model(x), state(model)
    adapter = la.attach(model, rank=2, init_lora_weights="pissa")
    assert not torch.equal(base_of(model.a["lin"]).weight, before["tensors"]["a.lin.weight"])
    close(model(x), output, rtol=1e-4, atol=1e-5)
    adapter.detach()
    assert_same(model, before)


def test_places_and_names():
    model = build(OneModule)
    assert other_names(model) == {"b.lin": "a.lin", "b.again": "a.lin"}
    assert held_twice(model, ["a.lin", "b.own"]) == ["a.lin"]
    block = build(OneBlock)
    assert set(other_names(block)) == {"layers.1.block", "layers.1.block.0", "layers.1.block.1"}
    assert held_twice(block, ["layers.0.block", "layers.0.block.0"]) == ["layers.0.block"]
    assert other_names(build(OneWeight)) == {}
