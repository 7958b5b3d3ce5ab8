"""`ops.linear` against the slow reference: outputs and every gradient, in float64, over shapes, ranks and options."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_checks import assert_close, gradients, randn, scalings

from lora_adapters.ops import lowrank, reference
from lora_adapters.ops.frozen import Dense
from lora_adapters.ops.linear import Dtypes, Member, lora_linear
from lora_adapters.ops.plain import is_plain, plain_linear
from lora_adapters.ops.single import single_linear

KINDS = ("split", "merged", "beside", "transposed")
WIDE = torch.float64


def inputs(shape, layout, generator):
    """A tensor of this shape with the given strides."""
    if layout == "transposed" and len(shape) > 1:
        return randn((shape[-1], *shape[1:-1], shape[0]), generator).transpose(0, -1)
    if layout == "sliced":
        return randn((*shape[:-1], 2 * shape[-1] + 1), generator)[..., 1::2]
    if layout == "expanded" and len(shape) > 1:
        return randn((1, *shape[1:]), generator).expand(shape)
    return randn(shape, generator)


@st.composite
def cases(draw):
    """One call: the input's shape and layout, the layers of the group, and what needs gradients."""
    width = draw(st.integers(1, 9))
    lead = draw(st.lists(st.integers(0, 3), max_size=4))
    member = st.tuples(
        st.sampled_from(KINDS),
        st.integers(1, 9),
        st.booleans(),
        st.lists(st.tuples(st.integers(1, 12), scalings), min_size=1, max_size=3),
    )
    return {
        "shape": (*lead, width),
        "layout": draw(st.sampled_from(("plain", "transposed", "sliced", "expanded"))),
        "members": draw(st.lists(member, min_size=1, max_size=3)),
        "wants": draw(st.lists(st.booleans(), min_size=40, max_size=40)),
        "seed": draw(st.integers(0, 99)),
    }


def build(case):
    """The tensors of a case: x, and for each member its weight, addend and factors."""
    generator = torch.Generator().manual_seed(case["seed"])
    x, wants = inputs(case["shape"], case["layout"], generator), iter(case["wants"])
    layers = []
    for kind, out, bias, adapters in case["members"]:
        weight = randn((out, x.shape[-1]), generator)
        addend = randn((*x.shape[:-1], out) if kind == "beside" else (out,), generator)
        factors = [t for r, _ in adapters for t in (randn((r, x.shape[-1]), generator), randn((out, r), generator))]
        layers.append((kind, weight, addend if bias or kind == "beside" else None, factors, [s for _, s in adapters]))
    tensors = [x, *(t for _, _, addend, factors, _ in layers for t in (addend, *factors) if t is not None)]
    for tensor in tensors:
        tensor.requires_grad_(next(wants, True))
    return x, layers, tensors


def frozen(kind, weight):
    if kind == "beside":
        return None
    return Dense(weight.t().contiguous(), True) if kind == "transposed" else Dense(weight)


def is_single(layers):
    """Whether `ops.single`, the way for the most common call, takes it too."""
    return len(layers) == 1 and layers[0][0] != "beside" and len(layers[0][3]) == 2


def alone(x, layer, base=None, low=None):
    kind, weight, addend, factors, (scale,) = layer
    settings = (scale, base or x.dtype, low or x.dtype, x.dtype)
    return single_linear(x, frozen(kind, weight), kind == "merged", addend, *factors, *settings)


def arguments(x, layers, dtypes=None):
    members = [Member(frozen(k, weight), k == "merged", tuple(s), x.dtype) for k, weight, _, _, s in layers]
    addends = [addend for _, _, addend, _, _ in layers]
    factors = [t for _, _, _, pair, _ in layers for t in pair]
    return x, members, addends, factors, dtypes or Dtypes(x.dtype, x.dtype)


def ours(x, layers, dtypes=None):
    return lora_linear(*arguments(x, layers, dtypes))


def others(x, layers):
    """The outputs of the shorter functions, where they may be chosen."""
    if is_single(layers):
        yield [alone(x, layers[0])]
    _, members, addends, factors, dtypes = arguments(x, layers)
    if is_plain(members, factors, dtypes):
        yield plain_linear(x, members, addends, factors, dtypes)


def oracle(x, layers):
    outputs = []
    for kind, weight, addend, factors, scale in layers:
        terms = [(a, b, s, None) for a, b, s in zip(factors[::2], factors[1::2], scale, strict=True)]
        if kind == "beside":
            outputs.append(addend + reference.linear(x, torch.zeros_like(weight), None, terms))
        else:
            outputs.append(reference.linear(x, weight, addend, terms))
    return outputs


def one(kind, shape, out, adapters, bias=True, layout="plain"):
    return {
        "shape": shape,
        "layout": layout,
        "members": [(kind, out, bias, adapters)],
        "wants": [True] * 40,
        "seed": 1,
    }


@settings(max_examples=150, deadline=None)
@given(cases())
@example(one("split", (3, 1, 2, 1, 5), 7, [(512, 0.5)]))
@example(one("merged", (4, 5), 7, [(512, 2), (1, -1.0)]))
@example(one("split", (0, 5), 7, [(3, 1)]))
@example(one("merged", (2, 0, 5), 7, [(3, 1)]))
@example(one("beside", (0, 5), 7, [(3, 2)]))
@example(one("split", (5,), 7, [(3, 1)], bias=False))
@example(one("split", (2, 3, 5), 7, [(3, 0.37)]) | {"members": [("split", 7, True, [(3, 0.37)])] * 3})
@example(one("transposed", (2, 3, 5), 7, [(3, -1.5)], layout="sliced"))
@example(one("merged", (2, 3, 5), 7, [(512, 0.37)], layout="transposed"))
@example(one("split", (2, 3, 5), 7, [(512, 0)], layout="expanded"))
def test_outputs_and_every_gradient(case):
    x, layers, tensors = build(case)
    got, want = ours(x, layers), oracle(x, layers)
    assert [y.shape for y in got] == [y.shape for y in want]
    for y, expected in zip(got, want, strict=True):
        assert_close(y, expected, 1e-9)
    wanted = gradients(want, tensors)
    for mine, expected in zip(gradients(got, tensors), wanted, strict=True):
        assert_close(mine, expected, 1e-9)
    for other in others(x, layers):
        for y, expected in zip(other, want, strict=True):
            assert_close(y, expected, 1e-9)
        for mine, expected in zip(gradients(other, tensors), wanted, strict=True):
            assert_close(mine, expected, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision(kind):
    x, layers, tensors = build(one(kind, (3, 37, 65), 129, [(16, 0.5), (7, 1.3)]))
    want = gradients(exact := oracle(x, layers), tensors)
    narrow = {id(t): t.detach().float().requires_grad_(t.requires_grad) for t in tensors}
    layers = [
        (k, w.float(), None if a is None else narrow[id(a)], [narrow[id(f)] for f in factors], s)
        for k, w, a, factors, s in layers
    ]
    got = ours(narrow[id(x)], layers)
    for mine, expected in zip([*got, *gradients(got, list(narrow.values()))], [*exact, *want], strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, expected, 1e-6)


@pytest.mark.parametrize("slice_", [1 << 20, 40, 1])
@pytest.mark.parametrize("kind", ["split", "merged", "beside"])
def test_factors_wider_than_the_input_are_used_a_slice_of_rows_at_a_time(kind, slice_, monkeypatch):
    """A 32-bit input under 64-bit factors: what is converted at once must not matter."""
    monkeypatch.setattr(lowrank, "_SLICE", slice_)
    x, layers, tensors = build(one(kind, (2, 19, 13), 11, [(5, 0.7), (3, 2)]))
    want = gradients(exact := oracle(x, layers), tensors)
    small = x.detach().float().requires_grad_()
    layers = [(k, w.float(), a, f, s) for k, w, a, f, s in layers]
    got = ours(small, layers, Dtypes(torch.float32, WIDE))
    leaves = [small, *tensors[1:]]
    mine = gradients(got, leaves)
    assert [g.dtype for g in mine] == [t.dtype for t in leaves]
    for result, expected in zip([*got, *mine], [*exact, *want], strict=True):
        assert_close(result, expected, 2e-6)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [[(4, 1)], [(4, 0.5)], [(4, 0.5), (2, 1)]])
def test_narrow_factors_take_nothing_from_the_base_and_its_bias(adapters, low):
    """16-bit adapters on an fp32 base: where they add nothing, the result is the base's, to fp32's precision."""
    x, layers, _ = build(one("split", (3, 37, 65), 129, adapters))
    narrow = [
        (k, w.float(), bias.detach().float(), [(f * (i % 2 == 0)).to(low) for i, f in enumerate(factors)], s)
        for k, w, bias, factors, s in layers
    ]
    want = torch.nn.functional.linear(x, layers[0][1], layers[0][2])
    x = x.detach().float()
    outputs = [ours(x, narrow, Dtypes(torch.float32, low))[0]]
    if is_single(narrow):
        outputs.append(alone(x, narrow[0], torch.float32, low))
    for y in outputs:
        assert_close(y, want, 1e-6)


def test_an_output_that_nobody_uses_gives_no_gradient():
    case = one("split", (4, 6), 5, [(2, 1)]) | {
        "members": [("split", 5, True, [(2, 1)]), ("merged", 3, True, [(4, 2)])]
    }
    x, layers, tensors = build(case)
    unused, used = ours(x, layers)
    used.square().sum().backward()
    assert [t.grad is None for t in tensors] == [False, True, True, True, False, False, False]
    got = [t.grad for t in tensors if t.grad is not None]
    leaves = [t for t in tensors if t.grad is not None]
    want = torch.autograd.grad(oracle(x, layers)[1].square().sum(), leaves)
    for mine, expected in zip(got, want, strict=True):
        assert_close(mine, expected, 1e-9)
    assert unused.grad_fn is used.grad_fn


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6), (6,)])
def test_outputs_may_be_written_to(shape):
    """An activation in place follows many layers. Autograd forbids that for the view of a custom function's result."""
    x, layers, tensors = build(one("split", shape, 5, [(2, 1)]))
    want = gradients([torch.relu(oracle(x, layers)[0])], tensors)
    for (y,) in (ours(x, layers), *others(x, layers)):
        for mine, expected in zip(gradients([torch.relu_(y)], tensors), want, strict=True):
            assert_close(mine, expected, 1e-9)


def test_a_second_derivative_raises():
    x, layers, _ = build(one("split", (3, 6), 5, [(2, 1)]))
    for y in (ours(x, layers)[0], alone(x, layers[0])):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.square().sum().backward()


@pytest.mark.parametrize("call", [alone, lambda x, layer: ours(x, [layer])[0]], ids=["single", "group"])
@pytest.mark.parametrize("which", ["x", "weight", "a", "b"])
def test_writing_between_forward_and_backward_raises(which, call):
    x, layers, tensors = build(one("split", (3, 6), 5, [(2, 1)], bias=False))
    tensor = {"x": x, "weight": layers[0][1], "a": tensors[1], "b": tensors[2]}[which]
    y = call(x, layers[0])
    with torch.no_grad():
        tensor.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("probabilities", [(0.3,), (0.5, 0.0), (0.9, 0.1), (1.0, 0.2)])
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
def test_dropout_draws_what_torch_would_have_drawn(probabilities, layout):
    adapters = [(3, 0.5), (2, -1)][: len(probabilities)]
    x, layers, tensors = build(one("split", (4, 3, 6), 5, adapters, layout=layout))
    _, weight, bias, factors, scale = layers[0]
    torch.manual_seed(11)
    masks = [torch.nn.functional.dropout(torch.ones_like(x), p) for p in probabilities]
    after = torch.rand(1)
    terms = list(zip(factors[::2], factors[1::2], scale, masks, strict=True))
    want = reference.linear(x, weight, bias, terms)
    torch.manual_seed(11)
    member = Member(Dense(weight), False, tuple(scale), WIDE, probabilities)
    (got,) = lora_linear(x, [member], [bias], factors, Dtypes(WIDE, WIDE))
    assert torch.equal(torch.rand(1), after)
    assert_close(got, want, 1e-9)
    before = torch.get_rng_state()
    for mine, expected in zip(gradients([got], tensors), gradients([want], tensors), strict=True):
        assert_close(mine, expected, 1e-9)
    assert torch.equal(torch.get_rng_state(), before)
