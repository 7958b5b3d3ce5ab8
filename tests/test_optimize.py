"""optimize: what PEFT's layers compute stays the same, nothing else changes, later layers are covered, undo goes back."""

import copy
import gc
import pickle
import weakref

import peft
import pytest
import torch
from helpers import assert_same, llama, net, perturb, state, tokens
from packaging.version import Version
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora.layer import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from transformers.integrations.peft import MIN_PEFT_VERSION

import lora_adapters as la
from lora_adapters.errors import NoTargetError, RequestError, StateError
from lora_adapters.layers.engine import EngineLayer
from lora_adapters.layers.fused import FusedForward
from lora_adapters.layers.optimized import stock_class
from lora_adapters.weights import guard_cpu_repacking

X = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(1))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted_llama(**options):
    """Stock PEFT around a dense Llama: linear layers and the embedding."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[*LINEAR, "embed_tokens"], **options)
    return ready(get_peft_model(llama(), config))


def adapted_gpt2():
    torch.manual_seed(0)
    still = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=32, n_positions=32, **still))
    return ready(get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)))


def injected_net():
    """Not a PeftModel: a convolution, an embedding and linear layers with PEFT's layers put in."""
    torch.manual_seed(0)
    model = net()
    model.conv = nn.Conv1d(32, 32, 3, padding=1)
    return ready(inject_adapter_in_model(LoraConfig(r=4, target_modules=["conv", "emb", "0.0", "0.2"]), model))


def image_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 3, stride=2, padding=1, groups=2))
    return ready(get_peft_model(model, LoraConfig(r=4, lora_alpha=2, target_modules=["0", "2"])))


def ready(model, adapter_values=5):
    perturb(model, adapter_values)
    guard_cpu_repacking(model)  # stock bitsandbytes would compute wrong values on some CPUs
    return model.train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama(hidden_size=64).save_pretrained(folder)
    return folder


def quantized(folder, **options):
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **options)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    return ready(get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)))


KINDS = {
    "llama": lambda folder: (adapted_llama(), X),
    "gpt2": lambda folder: (adapted_gpt2(), X),
    "injected": lambda folder: (injected_net(), tokens()),
    "images": lambda folder: (image_net(), torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))),
    "nf4": lambda folder: (quantized(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4"), X),
    "fp4": lambda folder: (
        quantized(folder, load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
        X,
    ),
    "int8": lambda folder: (quantized(folder, load_in_8bit=True), X),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def output(model, x=X):
    result = model(x)
    return getattr(result, "logits", result)


def run(model, x):
    """Return the output, and every gradient by name."""
    model.zero_grad()
    y = output(model, x)
    (y.double() * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
    return y.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def all_optimized(model):
    layers = lora_layers(model).values()
    return bool(layers) and all(stock_class(type(layer)) is not None for layer in layers)


def all_stock(model):
    layers = lora_layers(model).values()
    return bool(layers) and all(type(layer).__module__.startswith("peft.") for layer in layers)


# ---- the same results -----------------------------------------------------------------------------------------------


@every_kind
def test_outputs_and_gradients_are_pefts(kind, folder):
    stock, x = KINDS[kind](folder)
    ours, _ = KINDS[kind](folder)
    report = la.optimize(ours)
    assert all_optimized(ours)
    assert not {"parent", "stock"} & set(report.counts)
    expected, expected_gradients = run(stock, x)
    for _ in range(3):  # layers that share an input compute together from the second time on
        y, gradients = run(ours, x)
        close(y, expected)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            close(gradient, expected_gradients[name])
    with torch.no_grad():
        close(output(ours.eval(), x), output(stock.eval(), x))
    # The adapter matters, or all this would show nothing.
    for layer in lora_layers(ours).values():
        layer.enable_adapters(False)
    assert (output(ours, x) - expected).abs().max() > 1e-3 * expected.abs().max()


@every_kind
def test_the_fast_functions_are_what_runs(kind, folder):
    model, x = KINDS[kind](folder)
    ran = {}
    for name, layer in lora_layers(model).items():
        layer.register_forward_hook(lambda _, __, y, name=name: ran.update({name: _makers(y)}))
    la.optimize(model)
    output(model, x)
    assert ran.keys() == lora_layers(model).keys()
    assert all("lora_adapters" in makers for makers in ran.values())


def _makers(y):
    """The packages of the autograd functions nearest to a result. PEFT's layers have none of their own."""
    nodes = [y.grad_fn, *(node for node, _ in y.grad_fn.next_functions if node is not None)]
    return {type(node)._forward_cls.__module__.split(".")[0] for node in nodes if hasattr(type(node), "_forward_cls")}


def test_several_active_adapters():
    def two():
        model = adapted_llama()
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        model.base_model.set_adapter(["default", "second"])
        return ready(model, 7)

    stock, ours = two(), two()
    la.optimize(ours)
    (expected, theirs), (y, gradients) = run(stock, X), run(ours, X)
    close(y, expected)
    for name, gradient in gradients.items():
        close(gradient, theirs[name])


def test_mixed_batches_and_disabled_adapters():
    stock, ours = adapted_llama().eval(), adapted_llama().eval()
    la.optimize(ours)
    names = ["default", "__base__"]
    close(ours(X, adapter_names=names).logits, stock(X, adapter_names=names).logits)
    with stock.disable_adapter(), ours.disable_adapter():
        assert torch.equal(output(ours), output(stock))


@every_kind
def test_copies_and_pickles_stay_optimized(kind, folder):
    model, x = KINDS[kind](folder)
    la.optimize(model)
    expected, gradients = run(model, x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all_optimized(again)
        y, own = run(again, x)
        assert torch.equal(y, expected)
        assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


# ---- nothing else changes -------------------------------------------------------------------------------------------


@every_kind
def test_names_reprs_and_keys_stay(kind, folder):
    model, _ = KINDS[kind](folder)
    names = {name: type(layer).__name__ for name, layer in lora_layers(model).items()}
    text, keys = repr(model), list(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    la.optimize(model)
    assert {name: type(layer).__name__ for name, layer in lora_layers(model).items()} == names
    assert (repr(model), list(model.state_dict())) == (text, keys)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@every_kind
def test_merging_is_pefts(kind, folder):
    (stock, x), (ours, _) = KINDS[kind](folder), KINDS[kind](folder)
    la.optimize(ours)
    can_merge = [name for name, layer in lora_layers(ours).items() if getattr(layer.get_base_layer(), "groups", 1) == 1]
    for step in ("merge", "unmerge", "merge"):
        for name in can_merge:
            getattr(stock.get_submodule(name), step)()
            getattr(ours.get_submodule(name), step)()
        for key, value in stock.state_dict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(ours.state_dict()[key], value), key
        if len(can_merge) == len(lora_layers(ours)) and step == "merge":
            assert torch.equal(output(ours, x), output(stock, x))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "nf4"])
def test_merge_and_unload_gives_the_same_model(kind, folder):
    (stock, x), (ours, _) = KINDS[kind](folder), KINDS[kind](folder)
    la.optimize(ours)
    stock, ours = stock.merge_and_unload().eval(), ours.merge_and_unload().eval()
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    assert torch.equal(output(ours, x), output(stock, x))


def test_layers_merged_before():
    stock, ours = adapted_llama(), adapted_llama()
    for model in (stock, ours):
        model.merge_adapter()
    report = la.optimize(ours)
    assert report.counts == {"parent": 15}
    assert "merged" in report.layers[0].reason
    assert torch.equal(output(ours), output(stock))
    for model in (stock, ours):
        model.unmerge_adapter()
    close(output(ours), output(stock))
    assert "parent" not in la.optimize(ours).counts


def test_saved_files_are_the_same_bytes(tmp_path):
    for name, model in (("stock", adapted_llama()), ("ours", adapted_llama())):
        if name == "ours":
            la.optimize(model)
        model.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()


def test_the_model_is_not_kept_alive():
    model = adapted_llama()
    report = la.optimize(model)
    gone = weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert gone() is None
    report.undo()


# ---- layers that come later -----------------------------------------------------------------------------------------


def test_adapters_that_peft_adds_later(tmp_path):
    other = ready(get_peft_model(llama(), LoraConfig(r=3, target_modules=["lm_head", "q_proj"])), 9)
    other.save_pretrained(tmp_path)
    stock, ours = adapted_llama(), adapted_llama()
    la.optimize(ours)
    for model in (stock, ours):
        model.load_adapter(str(tmp_path), "loaded")
        model.add_adapter("fresh", LoraConfig(r=2, target_modules=["lm_head"]))
        model.add_weighted_adapter(["default", "loaded"], [0.5, 0.5], "sum", combination_type="cat")
    assert "lm_head" in lora_layers(ours.get_base_model())
    assert all_optimized(ours)
    for name in ("default", "loaded", "sum"):
        stock.set_adapter(name)
        ours.set_adapter(name)
        close(output(ours), output(stock))
    ours.delete_adapter("default")
    stock.delete_adapter("default")
    close(output(ours), output(stock))


@pytest.mark.parametrize("compiled", [False, True])
def test_hot_swapped_adapters(tmp_path, compiled):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=LINEAR)
    ready(get_peft_model(llama(), config), 9).save_pretrained(tmp_path)
    models = [ready(get_peft_model(llama(), LoraConfig(r=4, target_modules=LINEAR))).eval() for _ in range(2)]
    stock, ours = models
    la.optimize(ours)
    for model in models:
        if compiled:
            prepare_model_for_compiled_hotswap(model, target_rank=8)
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert all_optimized(ours)
    close(output(ours), output(stock))
    close(output(ours), output(PeftModel.from_pretrained(llama(), str(tmp_path)).eval()))
    reasons = {layer.reason for layer in la.optimize(ours).layers}
    assert reasons == ({"the scaling is a Tensor, not a number"} if compiled else {"a dense weight"})


def test_a_base_whose_layers_were_all_unloaded_is_still_covered():
    model = adapted_llama()
    la.optimize(model)
    base = model.unload()
    assert not lora_layers(base)
    again = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert all_optimized(again)
    again.unload()
    assert all_optimized(inject_adapter_in_model(LoraConfig(r=2, target_modules=["v_proj"]), base))


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="this transformers takes a newer PEFT only"
)
def test_adapters_of_transformers_own_methods(tmp_path):
    adapted_llama().save_pretrained(tmp_path)
    model = llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "one")
    la.optimize(model)
    model.load_adapter(str(tmp_path), "two")
    assert len(lora_layers(model)) == 15
    assert all_optimized(model)
    model.set_adapter("two")
    close(output(model.eval()), output(adapted_llama().eval()))


def test_only_optimized_models_are_touched():
    la.optimize(adapted := adapted_llama())
    bystander = adapted_llama()
    bystander.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    assert all_stock(bystander)
    assert all_optimized(adapted)


def test_parts_of_an_optimized_model_and_models_around_one():
    config = LoraConfig(r=2, target_modules=["0.0"])
    pair = nn.ModuleDict({"one": net(), "two": net()})
    inject_adapter_in_model(config, pair["one"])
    la.optimize(pair)
    inject_adapter_in_model(config, pair["two"])  # inside
    assert len(lora_layers(pair)) == 2
    assert all_optimized(pair)

    pair = nn.ModuleDict({"one": net(), "two": net()})
    inject_adapter_in_model(config, pair["one"])
    la.optimize(pair["one"])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0.2"]), pair)  # around
    assert len(lora_layers(pair["one"])) == 2
    assert all_optimized(pair["one"])
    assert all_stock(pair["two"])


# ---- undo -----------------------------------------------------------------------------------------------------------


@every_kind
def test_undo_restores_every_class(kind, folder):
    model, x = KINDS[kind](folder)
    expected = output(model, x)
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    report = la.optimize(model)
    output(model, x)
    report.undo()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(output(model, x), expected)
    report.undo()
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_undo_reaches_later_and_departed_layers_and_ends_the_cover():
    model = adapted_llama()
    report = la.optimize(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    base = model.get_base_model()
    departed = base.lm_head
    base.lm_head = departed.get_base_layer()
    la.optimize(model)
    report.undo()
    assert all_stock(model)
    assert type(departed) is peft_layers.Linear
    model.add_adapter("third", LoraConfig(r=2, target_modules=["lm_head"]))
    assert type(base.lm_head) is peft_layers.Linear


def test_optimizing_again_after_undo():
    model = adapted_llama()
    la.optimize(model).undo()
    report = la.optimize(model)
    assert all_optimized(model)
    assert report.layers == la.optimize(model).layers


# ---- the report, and what is left alone -----------------------------------------------------------------------------


def test_the_report_and_its_table(folder):
    model, _ = KINDS["nf4"](folder)
    report = la.optimize(model)
    assert report.counts == {"merged": 14}
    first = report.layers[0]
    assert (first.name, first.kind, first.path) == ("model.layers.0.self_attn.q_proj", "Linear4bit", "merged")
    assert "14 adapter layers: 14 merged" in repr(report)
    lines = str(report).splitlines()
    assert lines[0] == "14 adapter layers: 14 merged"
    assert [line.split()[:4] for line in lines if "q_proj" in line] == [["merged", "14", "Linear4bit", first.name]]


class Zoo(nn.Module):
    """Layers that stay PEFT's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.volume = nn.Conv3d(2, 2, 1)
        self.attention = nn.MultiheadAttention(8, 2)
        self.mine = nn.Linear(8, 8)
        self.wrapped = nn.Linear(8, 8)


class MyLinear(peft_layers.Linear):
    """Somebody's own layer."""


def test_layers_without_a_fast_forward_stay_and_say_why():
    zoo = Zoo()
    targets = ["linear", "volume", "attention", "mine", "wrapped"]
    model = get_peft_model(zoo, LoraConfig(r=2, target_modules=targets))
    zoo.mine.__class__ = MyLinear
    zoo.wrapped.forward = zoo.wrapped.forward
    classes = {name: type(module) for name, module in zoo.named_modules() if name != "linear"}
    report = la.optimize(model)
    assert {name: type(module) for name, module in zoo.named_modules() if name != "linear"} == classes
    found = {layer.name: (layer.path, layer.reason) for layer in report.layers}
    assert found == {
        "linear": ("split", "a dense weight"),
        "volume": ("stock", "there is no faster forward for PEFT's Conv3d"),
        "attention": ("stock", "there is no faster forward for PEFT's MultiheadAttention"),
        "attention.base_layer.out_proj": ("stock", "PEFT's MultiheadAttention merges it and never calls it"),
        "mine": ("stock", f"{MyLinear.__module__}.MyLinear is not PEFT's own class"),
        "wrapped": ("stock", "a forward was put on the layer, and runs instead of its class's"),
    }
    assert report.counts == {"split": 1, "stock": 5}
    text = " ".join(str(report).split())
    assert "1 split, 5 left to PEFT" in text
    assert "left to PEFT 1 Conv3d volume there is no faster" in text


def test_target_parameters_and_variants():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0.0"], use_dora=True))
    model.add_adapter("whole", LoraConfig(r=2, target_parameters=["blocks.0.2.weight"]))
    with torch.no_grad():
        expected = output(model, tokens())
    found = {(layer.kind, layer.path): layer.reason for layer in la.optimize(model).layers}
    assert found == {
        ("Linear", "parent"): "PEFT's DoraLinearVariant",
        ("ParamWrapper", "stock"): "there is no faster forward for PEFT's ParamWrapper",
    }
    with torch.no_grad():
        assert torch.equal(output(model, tokens()), expected)


def test_other_tuners_beside_lora():
    model = PeftMixedModel(net(), LoraConfig(r=2, target_modules=["0.0"]), "default")
    model.add_adapter("other", LoHaConfig(r=2, target_modules=["0.2"]))
    found = {layer.name.removeprefix("base_model.model."): layer for layer in la.optimize(model).layers}
    left = "a layer of PEFT's loha: only LoRA has faster forwards"
    assert {name: (layer.path, layer.reason) for name, layer in found.items()} == {
        "blocks.0.0": ("split", "a dense weight"),
        "blocks.0.2": ("stock", left),
    }
    model.add_adapter("third", LoraConfig(r=2, target_modules=["head"]))
    assert stock_class(type(model.get_submodule("base_model.model.head"))) is peft_layers.Linear


def test_a_compiled_wrapper():
    model = adapted_llama().eval()
    expected = output(model).detach()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    report = la.optimize(compiled)
    assert len(report.layers) == 15
    assert all_optimized(model)
    close(output(compiled).detach(), expected)


def test_what_can_not_be_optimized():
    class Pipeline:
        components = {"unet": adapted_llama(), "vae": llama(), "tokenizer": None}

    with pytest.raises(RequestError, match=r"got a Pipeline\. Its parts with LoRA layers: optimize \.unet\."):
        la.optimize(Pipeline())
    with pytest.raises(RequestError, match="got a str"):
        la.optimize("model")
    with pytest.raises(NoTargetError, match=r"LlamaForCausalLM holds no LoRA layer\. Load or add an adapter first"):
        la.optimize(llama())
    with pytest.raises(NoTargetError, match="carries loha adapters"):
        la.optimize(get_peft_model(llama(), LoHaConfig(r=2, target_modules=["q_proj"])))


# ---- beside this package's own adapters -----------------------------------------------------------------------------


def test_attach_adds_an_adapter_to_an_optimized_model():
    stock, ours = adapted_llama(), adapted_llama()
    report = la.optimize(ours)
    adapter = la.attach(ours, rank=2, targets="attention", adapter_name="second")
    assert adapter.model is ours
    layers = lora_layers(ours.get_base_model())
    assert {name for name, layer in layers.items() if isinstance(layer, EngineLayer)} == set(adapter.layers)
    ours.set_adapter("default")
    (expected, theirs), (y, gradients) = run(stock, X), run(ours, X)
    close(y, expected)
    for name, gradient in theirs.items():
        close(gradients[name], gradient)
    report.undo()
    assert {name for name, layer in layers.items() if isinstance(layer, FusedForward)} == set(adapter.layers)
    ours.set_adapter("second")
    adapter.merge()
    adapter.unmerge()
    adapter.detach()
    ours.set_adapter("default")
    close(output(ours), expected)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_attach_refuses_layers_that_peft_has_merged(optimized, options):
    model = adapted_llama()
    expected = output(model)
    model.merge_adapter()
    if optimized:
        la.optimize(model)
    before = state(model)
    with pytest.raises(StateError, match=r"q_proj' has 'default' merged into its base\. Unmerge first"):
        la.attach(model, rank=2, targets=["q_proj"], adapter_name="second", **options)
    assert_same(model, before)
    model.unmerge_adapter()
    close(output(model), expected)


def test_undo_beside_an_attached_layer():
    """One of the layers that computed together leaves the others."""
    stock, ours = adapted_llama(), adapted_llama()
    report = la.optimize(ours)
    la.attach(ours, rank=2, targets=["q_proj"], adapter_name="second")
    ours.set_adapter("default")
    expected, theirs = run(stock, X)
    for _ in range(3):
        run(ours, X)
    report.undo()
    for _ in range(3):
        y, gradients = run(ours, X)
        close(y, expected)
        for name, gradient in theirs.items():
            close(gradients[name], gradient)


def test_attached_adapters_are_only_reported():
    model = llama()
    adapter = la.attach(model, rank=2, targets="attention")
    classes = {name: type(module) for name, module in model.named_modules()}
    report = la.optimize(adapter.model)
    assert report.counts == {"split": 8}
    report.undo()
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_fused_false_is_pefts_forward():
    def attached(**options):
        adapter = la.attach(llama(), rank=2, targets="attention", seed=3, **options)
        perturb(adapter.model)
        return adapter

    fast, slow = attached(), attached(fused=False)
    assert {layer.fused for layer in fast.layers.values()} == {True}
    assert {layer.fused for layer in slow.layers.values()} == {False}
    close(output(slow.model), output(fast.model))
    assert "PEFT's forward" in slow.summary()
    assert "fused=False" in slow.summary()
    assert "a dense weight" in fast.summary()
    assert "split" in fast.summary()
    # The last adapter on a layer decides, and taking it off gives back what was there.
    la.attach(fast.model, rank=2, targets=["q_proj"], adapter_name="second", fused=False)
    assert {name for name, layer in fast.layers.items() if not layer.fused} == {
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    }


def test_restore_takes_fused_too(tmp_path):
    adapter = la.attach(llama(), rank=2)
    perturb(adapter.model)
    adapter.save(tmp_path)
    slow, fast = la.restore(llama(), tmp_path, fused=False), la.restore(llama(), tmp_path)
    assert {layer.fused for layer in slow.layers.values()} == {False}
    assert {layer.fused for layer in fast.layers.values()} == {True}
    close(output(slow.model), output(fast.model))


@pytest.mark.parametrize("value", [True, None, "yes", 0])
def test_other_values_of_fused_are_refused(value, tmp_path):
    model = llama()
    with pytest.raises(RequestError, match="fused must be 'auto' or False"):
        la.attach(model, fused=value)
    with pytest.raises(RequestError, match="fused must be 'auto' or False"):
        la.restore(model, tmp_path, fused=value)
    assert not lora_layers(model)


def test_the_summary_says_what_runs_a_variant():
    summary = la.attach(llama(), rank=2, use_dora=True).summary()
    assert "PEFT's forward" in summary
    assert "DoraLinearVariant" in summary
