"""Siblings that share an input compute as one, and every other use of them still gives what PEFT gives."""

import copy
import pickle
import threading

import pytest
import torch
from helpers import llama
from torch import nn

import lora_adapters as la
from lora_adapters.layers.fused import FusedForward


class Attention(nn.Module):
    """Three projections of one tensor, or by another method of whatever the test gives."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.q = nn.Linear(width, 20)
        self.k = nn.Linear(width, 12, bias=False)
        self.v = nn.Linear(width, 12)

    def forward(self, x):
        return self.q(x).square().sum() + (self.k(x) * self.v(x)).sum()


class Cross(Attention):
    def forward(self, x, other):
        return self.q(x).square().sum() + (self.k(other) * self.v(other)).sum()


class Reassigned(Attention):
    """One name, two tensors."""

    def forward(self, x):
        query = self.q(x)
        x = x * 2
        return query.square().sum() + (self.k(x) * self.v(x)).sum()


class Chosen(Attention):
    """What its forward says is not all that it does."""

    def swapped(self, x, swap):
        return self.q(x).square().sum() + (self.k(swap) * self.v(x)).sum()

    def forward(self, x, only="", swap=None):
        if only:
            return getattr(self, only)(x).sum()
        if swap is not None:
            return self.swapped(x, swap)
        return self.q(x).square().sum() + (self.k(x) * self.v(x)).sum()


def attention(quantization=None, cls=Attention, **options):
    torch.manual_seed(0)
    model = cls()
    la.attach(model, rank=3, targets=["q", "k", "v"], quantization=quantization, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    return model


def gradients(model, *arguments, **keywords):
    """Loss, the inputs' gradients and those of every parameter; None stays None."""
    model.zero_grad()
    given = [a.clone().requires_grad_() for a in arguments]
    loss = model(*given, **keywords)
    loss.backward()
    return [loss.detach(), *(a.grad for a in given), *(p.grad for p in model.parameters() if p.requires_grad)]


def stock(model, *arguments, **keywords):
    layers = [m for m in model.modules() if isinstance(m, FusedForward)]
    for layer in layers:
        layer.fused = False
    result = gradients(model, *arguments, **keywords)
    for layer in layers:
        del layer.fused
    return result


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-12


def groups(model):
    """The names of the layers of each group."""
    found = {id(m.siblings): m.siblings for m in model.modules() if getattr(m, "siblings", None) is not None}
    names = {id(m): n for n, m in model.named_modules()}
    return [tuple(names[id(layer)].split(".")[-1] for layer in group.layers) for group in found.values()]


def x(seed=1, width=24):
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_group_computes_the_same_and_the_same_bits_again(quantization):
    model = attention(quantization)
    assert groups(model) == [("q", "k", "v")]
    first = gradients(model, x())
    assert_close(first, stock(model, x()))
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(model, x()), strict=True))


def test_a_group_calls_one_function_for_all():
    model = attention()
    given = x().requires_grad_()
    q, k, v = model.q(given), model.k(given), model.v(given)
    assert q.grad_fn is k.grad_fn is v.grad_fn


@pytest.mark.parametrize("cls", [Cross, Reassigned])
def test_only_layers_that_are_given_one_variable_join(cls):
    model = attention(cls=cls)
    inputs = (x(), x(2)) if cls is Cross else (x(),)
    assert groups(model) == [("k", "v")]
    assert_close(gradients(model, *inputs), stock(model, *inputs))


def test_groups_of_known_models():
    model = llama()
    la.attach(model, rank=2, targets="all-linear")
    assert groups(model) == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")] * 2


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_siblings_called_otherwise_than_the_source_says(quantization):
    model = attention(quantization, Chosen)
    assert groups(model) == [("q", "k", "v")]
    assert_close(gradients(model, x(), swap=x(2)), stock(model, x(), swap=x(2)))
    for name in "qkv":
        assert_close(gradients(model, x(3), only=name), stock(model, x(3), only=name))
        assert_close(gradients(model, x()), stock(model, x()))


def test_a_result_nobody_used_gives_no_gradient():
    """An optimizer would take zeros for a gradient: decay the weights, and count a step."""
    model = attention()
    given = x().requires_grad_()
    model.zero_grad()
    model.q(given).sum().backward()
    assert model.q.lora_A["default"].weight.grad is not None
    assert model.k.lora_A["default"].weight.grad is None
    assert model.v.lora_B["default"].weight.grad is None


def test_what_changes_between_two_siblings_is_seen():
    model = attention()
    given = x()
    with torch.enable_grad():
        model.q(given)
        with torch.no_grad():
            model.k.lora_B["default"].weight.mul_(2)
        assert_close([model.k(given)], [stock_output(model.k, given)])
        model.q(given)
        model.v.scaling["default"] = 3.0
        assert_close([model.v(given)], [stock_output(model.v, given)])
        model.q(given)
        given.mul_(2)
        assert_close([model.k(given)], [stock_output(model.k, given)])
        model.q(given)
        model.k.train(False)
        assert_close([model.k(given)], [stock_output(model.k, given)])
        model.q(given)
        model.k.enable_adapters(False)
        assert_close([model.k(given)], [model.k.base_layer(given)])


def stock_output(layer, given):
    layer.fused = False
    try:
        return layer(given)
    finally:
        del layer.fused


def test_dropout_draws_its_masks_in_the_models_order():
    model = attention(dropout=0.4)
    for _ in range(3):
        torch.manual_seed(7)
        theirs = stock(model, x())
        torch.manual_seed(7)
        assert_close(gradients(model, x()), theirs)


def test_a_sibling_with_a_hook_computes_alone():
    model = attention()
    seen = []
    model.k.lora_A["default"].register_forward_hook(lambda *_: seen.append("A"))
    model.v.base_layer.register_forward_hook(lambda *_: seen.append("base"))
    theirs = stock(model, x())
    seen.clear()
    assert_close(gradients(model, x()), theirs)
    assert seen == ["A", "base"]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_gradient_checkpointing_with_several_forwards_before_a_backward(reentrant, quantization):
    """The number of tensors kept must be the same in a forward and its repetition."""
    model = llama()
    la.attach(model, rank=3, quantization=quantization, targets="all-linear", init_lora_weights=False, seed=1)
    model.train()
    tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    expected = token_gradients(model, tokens, 1)
    model.model.gradient_checkpointing = True
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for forwards in (2, 1, 2, 1):
        found = token_gradients(model, tokens, forwards)
        for name, gradient in expected.items():
            assert (found[name] / forwards - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name


def token_gradients(model, tokens, forwards):
    model.zero_grad()
    losses = [model(tokens, labels=tokens).loss for _ in range(forwards)]
    torch.stack(losses).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_threads():
    model = attention()
    inputs = [x(seed) for seed in range(4)]
    expected = [stock_results(model, given) for given in inputs]
    found = [None] * len(inputs)

    def work(index):
        for _ in range(20):
            found[index] = results(model, inputs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


def results(model, given):
    given = given.clone().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(given)
    return [loss.detach(), *torch.autograd.grad(loss, [given, *parameters])]


def stock_results(model, given):
    layers = [m for m in model.modules() if isinstance(m, FusedForward)]
    for layer in layers:
        layer.fused = False
    found = results(model, given)
    for layer in layers:
        del layer.fused
    return found


def test_copies_have_groups_of_their_own():
    model = attention()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.q.siblings is not model.q.siblings
        assert twin.q.siblings.layers[0] is twin.q
        assert_close(gradients(twin, x()), stock(model, x()))
    alone = copy.copy(model.q)  # as DataParallel copies layers: it is not in the group
    assert_close([alone(x())], [stock_output(model.q, x())])


def test_several_adapters_and_detach():
    model = attention()
    la.attach(model, rank=2, targets=["q", "v"], adapter_name="second", init_lora_weights=False)
    for layer in (model.q, model.k, model.v):
        layer.set_adapter(["default", "second"] if layer is not model.k else ["default"])
    for _ in range(3):
        assert_close(gradients(model, x()), stock(model, x()))
    assert groups(model) == [("q", "k", "v")]


def test_compiled_code_computes_the_same():
    model = attention()
    theirs = stock(model, x())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, x()), theirs)
