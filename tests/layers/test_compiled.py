"""torch.compile: whole models without a graph break, equal to eager, and repeated blocks compiled once."""

import pytest
import torch
from helpers import llama, net, perturb, tokens
from layer_checks import adapted, assert_like
from packaging.version import Version
from torch import nn
from torch._dynamo.utils import counters

import lora_adapters as la
from lora_adapters.layers.routes import route


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def images():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding="same", groups=4),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", stride=2),
        nn.Flatten(1),
        nn.Linear(8 * 16, 5),
    )


MODELS = {
    "llama": (
        lambda: llama(num_hidden_layers=1),
        lambda: torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0)),
        "auto",
    ),
    "images": (
        images,
        lambda: torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        ["0", "2", "3", "5"],
    ),
    "net": (net, tokens, ["emb", "conv", "0", "2"]),
}


CASES = [(True, 0.0, None), (True, 0.0, "nf4"), (True, 0.2, None), (False, 0.0, "nf4")]


def results(model, run, x, train):
    """Output and gradients; None for gradients in eval mode without them."""
    model.train(train)
    model.zero_grad()
    torch.manual_seed(3)
    with torch.set_grad_enabled(train):
        y = run(x)
    y = getattr(y, "logits", y)
    if train:
        y.square().sum().backward()
    return {"y": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize(("train", "dropout", "quantization"), CASES)
@pytest.mark.parametrize("name", MODELS)
def test_no_graph_breaks_and_equal_to_eager(name, quantization, dropout, train):
    make, data, targets = MODELS[name]
    model, x = make(), data()
    la.attach(model, rank=3, targets=targets, quantization=quantization, dropout=dropout)
    perturb(model)
    want = results(model, model, x, train)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_like(results(model, compiled, x, train), want, 1e-5)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_repeated_blocks_are_compiled_once(quantization):
    """The first block's input needs no gradient, that of the others does: two graphs, however many blocks."""
    model = llama(num_hidden_layers=4, use_cache=False)  # a cache knows the number of its layer
    la.attach(model, rank=4, quantization=quantization)
    perturb(model)
    x = MODELS["llama"][1]()
    want = results(model, model, x, True)
    for block in model.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_like(results(model, model, x, True), want, 1e-5)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.skipif(
    Version(torch.__version__.split("+")[0]) < Version("2.12"),
    reason="code that torch 2.11 compiled does not notice that a base weight became trainable (docs/fast-path.md)",
)
def test_changes_of_state_are_noticed_by_compiled_code():
    """Scalings, active adapters, what trains, hooks, merging: each is read at every call."""
    model, layer = adapted(nn.Linear(24, 40), (0.0, 0.0))
    x = torch.randn(3, 24)
    compiled = torch.compile(model, backend="aot_eager")
    fired = []

    def change_scaling():
        layer.scaling["default"] = -0.3

    def change_active():
        layer.set_adapter(["second"])

    def train_the_base():
        layer.base_layer.weight.requires_grad_(True)

    def hook():
        layer.base_layer.register_forward_hook(lambda module, args, y: fired.append(1) or 2 * y)

    def disable():
        layer.enable_adapters(False)

    for change in (lambda: None, change_scaling, change_active, train_the_base, hook, disable):
        change()
        want = results(model, model, x, True)
        assert_like(results(model, compiled, x, True), want, 1e-5)
    assert fired


@pytest.mark.parametrize("kind", ["int8", "dora", "hooks on lora_A"])
def test_fallbacks_compile_as_in_peft(kind):
    options = {"use_dora": True} if kind == "dora" else {}
    model, layer = adapted(
        nn.Linear(64, 40),
        quantization="int8" if kind == "int8" else None,
        **options,
    )
    if kind == "hooks on lora_A":
        layer.lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(3, 64)
    breaks = {}
    for layer.fused in (False, True):
        torch._dynamo.reset()
        counters.clear()
        want = results(model, model, x, True)
        assert_like(results(model, torch.compile(model, backend="aot_eager"), x, True), want, 1e-5)
        breaks[layer.fused] = sum(counters["graph_break"].values())
    assert route(layer).path in ("beside", "parent")
    assert breaks[True] <= breaks[False]


def test_vmap_in_compiled_code():
    model, _ = adapted(nn.Linear(24, 40))
    x = torch.randn(4, 3, 24)
    want = torch.vmap(model)(x)
    got = torch.compile(torch.vmap(model), backend="aot_eager")(x)
    torch.testing.assert_close(got, want)


def test_inductor():
    """The real compiler, once: its C++ for the CPU."""
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    la.attach(model, rank=3, targets=["0", "2"])
    perturb(model)
    x = torch.randn(5, 16)
    want = results(model, model, x, True)
    assert_like(results(model, torch.compile(model, fullgraph=True), x, True), want, 1e-5)
