"""From a request to quantized modules."""

import subprocess
import sys
import types
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lora_adapters.errors import MissingDependencyError, PluginError, RequestError
from lora_adapters.hooks.specs import QuantizerSpec
from lora_adapters.sharing import tied_names
from lora_adapters.weights import (
    BUILTIN_QUANTIZERS,
    Bnb4bit,
    DenseStore,
    Int8,
    Nf4,
    mark_quantized,
    quantize_modules,
    quantized_format,
    quantizer_for,
    store_for,
)


class RoundedLinear(nn.Linear):
    """A third party's storage: weights rounded to bf16."""


class RoundedStore(DenseStore):
    def __init__(self, module):
        super().__init__(module)
        self.format = "rounded"


class Rounded:
    name = "rounded"

    def supports(self, module):
        return "" if type(module) is nn.Linear else "only nn.Linear"

    def nbytes(self, shape):
        return 2 * shape.numel()

    def quantize(self, module, compute_dtype):
        new = RoundedLinear(module.in_features, module.out_features, dtype=torch.bfloat16)
        new.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
        return new

    def store(self, module):
        return RoundedStore(module) if type(module) is RoundedLinear else None


@dataclass
class Config:
    """The attributes of transformers' BitsAndBytesConfig that are read."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: torch.dtype = torch.float32
    bnb_4bit_quant_storage: torch.dtype = torch.uint8
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False


@pytest.fixture
def third_party(monkeypatch):
    module = types.ModuleType("third_party_quantizer")
    module.Rounded, module.Broken, module.NotOne = Rounded, lambda: 1 / 0, dict
    monkeypatch.setitem(sys.modules, "third_party_quantizer", module)

    def spec(name="Rounded", **settings):
        return {"rounded": QuantizerSpec("rounded", 16, ("linear",), f"third_party_quantizer:{name}", **settings)}

    return spec


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(32, 64))})


def test_names_mean_block_64_with_nested_statistics():
    for name in ("nf4", "fp4"):
        quantizer = quantizer_for(name)
        assert (quantizer.quant_type, quantizer.blocksize, quantizer.nested) == (name, 64, True)
        assert quantizer.name == name
    assert isinstance(quantizer_for("int8"), Int8)
    for name, spec in BUILTIN_QUANTIZERS.items():
        assert (spec.name, spec.requires, spec.extra) == (name, ("bitsandbytes",), "bnb")


def test_configs():
    config = Config(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head"])
    assert quantizer_for(config) == Bnb4bit("fp4", 64, False, compute_dtype=torch.bfloat16, skip=("lm_head",))
    assert quantizer_for(Config(load_in_8bit=True, llm_int8_threshold=1.0)) == Int8(1.0)
    for bad in (
        Config(),
        Config(load_in_8bit=True, llm_int8_has_fp16_weight=True),
        Config(load_in_4bit=True, llm_int8_enable_fp32_cpu_offload=True),
    ):
        with pytest.raises(RequestError):
            quantizer_for(bad)
    assert quantizer_for(Nf4()) == Nf4()
    with pytest.raises(RequestError, match="neither a name"):
        quantizer_for(4)


def test_unknown_names_get_the_nearest(third_party):
    with pytest.raises(RequestError, match="Did you mean 'nf4'"):
        quantizer_for("nf-4")
    with pytest.raises(RequestError, match=r"Did you mean 'rounded'.*fp4, int8, nf4, rounded"):
        quantizer_for("round", third_party())


def test_missing_packages_name_the_extra(monkeypatch, third_party):
    monkeypatch.setattr("lora_adapters.hooks.manager.find_spec", lambda name: None)
    for request in ("nf4", Config(load_in_4bit=True)):
        with pytest.raises(MissingDependencyError, match=r"pip install 'lora-adapters\[bnb\]'"):
            quantizer_for(request)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lora-adapters\[bnb\]'"):
        Nf4().quantize(nn.Linear(2, 2), torch.float32)
    assert store_for(nn.Linear(2, 2)).format == "dense"
    assert quantized_format(model()) is None


def test_importing_needs_no_bitsandbytes():
    """A hidden bitsandbytes must not stop dense models; in a process of its own, as the tests here have imported it."""
    code = (
        "import sys; sys.modules['bitsandbytes'] = None; import torch, lora_adapters.weights as w; "
        "net = torch.nn.Sequential(torch.nn.Linear(2, 2)); assert w.store_for(net[0]).format == 'dense'; "
        "assert w.quantized_format(net) is None; assert w.guard_cpu_repacking(net) == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_third_party_quantizer(third_party):
    quantizer = quantizer_for("rounded", third_party())
    assert isinstance(quantizer, Rounded)
    net = model()
    quantize_modules(net, {"a": quantizer}, torch.float32)
    assert store_for(net["a"], [quantizer]).format == "rounded"
    assert quantized_format(net, [quantizer]) == "rounded"
    mark_quantized(net, quantizer)()
    assert not hasattr(net, "is_loaded_in_4bit")
    for name in ("Broken", "NotOne", "Absent"):
        with pytest.raises(PluginError, match="rounded"):
            quantizer_for("rounded", third_party(name))
    with pytest.raises(MissingDependencyError, match="no_such_package"):
        quantizer_for("rounded", third_party(requires=("no_such_package",)))


def test_modules_are_replaced_one_at_a_time_and_freed():
    net = model()
    names = ["b.1", "a", "b.0"]
    expected = {n: Nf4().quantize(net.get_submodule(n), torch.float32) for n in names}
    alive = {n: weakref.ref(net.get_submodule(n).weight) for n in names}
    seen = []

    def progress(done, total, name):
        seen.append((done, total, name))
        assert [n for n in names if alive[n]() is None] == names[:done]

    quantize_modules(net, dict.fromkeys(names, Nf4()), torch.float32, progress)
    assert seen == [(1, 3, "b.1"), (2, 3, "a"), (3, 3, "b.0")]
    for name, module in expected.items():
        assert torch.equal(store_for(net.get_submodule(name)).read(), store_for(module).read())
    assert quantized_format(net) == "nf4"


def test_several_formats_and_a_module_with_two_names():
    net = model()
    net["again"] = net["a"]
    quantize_modules(net, {"a": Nf4(), "again": Nf4(), "b.1": Int8()}, torch.float32)
    assert net["again"] is net["a"]
    assert quantized_format(net) == "int8+nf4"
    with pytest.raises(RequestError, match="dense parameter"):
        quantize_modules(net, {"a": Nf4()}, torch.float32)


def poison(net, value):
    with torch.no_grad():
        net["b"][1].weight[0, 0] = value
    return net


BAD = [
    (model, {"a": Nf4(), "b.11": Nf4()}, "Did you mean 'b.1'"),
    (model, {"a": Nf4(), "": Nf4()}, "no such submodule"),
    (model, {"a": Nf4(), "b": Nf4()}, "kinds"),
    (model, {"a": Nf4(), "b.0": Int8()}, "kinds"),
    (lambda: poison(model(), float("nan")), {"a": Nf4(), "b.1": Nf4()}, "not finite"),
    (lambda: poison(model(), float("inf")), {"a": Nf4(), "b.1": Nf4()}, "not finite"),
    (lambda: poison(model(), 1e5), {"a": Int8(), "b.1": Int8()}, "limit is 65504"),
]


@pytest.mark.parametrize("make, assignment, message", BAD, ids=[message for *_, message in BAD])
def test_bad_requests_change_nothing(make, assignment, message):
    net = make()
    before = {name: id(module) for name, module in net.named_modules()}
    with pytest.raises(RequestError, match=message):
        quantize_modules(net, assignment, torch.float32)
    assert {name: id(module) for name, module in net.named_modules()} == before


def test_tied_weights_are_refused():
    net = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False), "free": nn.Linear(4, 4)})
    assert tied_names(net) == {}
    net["head"].weight = net["embed"].weight
    net["alias"] = net["free"]
    assert set(tied_names(net)) == {"embed", "head"}
    assert "embed" in tied_names(net)["head"]
    with pytest.raises(RequestError, match="also the weight of embed"):
        quantize_modules(net, {"head": Nf4()}, torch.float32)
    meta = nn.ModuleDict({"x": nn.Linear(2, 2, device="meta"), "y": nn.Linear(2, 2, device="meta")})
    assert tied_names(meta) == {}
    meta["y"].weight = meta["x"].weight
    assert set(tied_names(meta)) == {"x", "y"}


def test_flags_on_a_model_that_is_not_from_transformers():
    net = model()
    undo = mark_quantized(net, Nf4())
    assert net.is_loaded_in_4bit
    assert not hasattr(net, "is_quantized")
    undo()
    assert not hasattr(net, "is_loaded_in_4bit")
