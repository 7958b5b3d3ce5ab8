"""`ops.conv` and `ops.embedding` against the slow reference: outputs and every gradient, in float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_checks import assert_close, gradients, randn, scalings

from lora_adapters.ops import reference
from lora_adapters.ops.conv import Geometry, Layer, lora_conv
from lora_adapters.ops.embedding import lora_embedding
from lora_adapters.ops.frozen import Dense
from lora_adapters.ops.linear import Dtypes

WIDE = torch.float64


@st.composite
def cases(draw):
    """One convolution: geometry, sizes that leave at least one output position, adapters, what needs gradients."""
    dims = draw(st.integers(1, 2))
    each = lambda low, high: st.lists(st.integers(low, high), min_size=dims, max_size=dims)  # noqa: E731
    return {
        "kind": draw(st.sampled_from(("split", "merged", "beside"))),
        "batch": draw(st.integers(0, 3)),
        "channels": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "groups": draw(st.integers(1, 3)),
        "kernel": draw(each(1, 3)),
        "stride": draw(each(1, 3)),
        "padding": draw(each(0, 2)),
        "dilation": draw(each(1, 2)),
        "extra": draw(each(0, 4)),
        "adapters": draw(st.lists(st.tuples(st.integers(1, 7), scalings), min_size=1, max_size=3)),
        "bias": draw(st.booleans()),
        "layout": draw(st.sampled_from(("plain", "channels_last", "sliced"))),
        "wants": draw(st.lists(st.booleans(), min_size=10, max_size=10)),
        "dropouts": draw(st.sampled_from(((), (0.4, 0.2, 0.7)))),
        "seed": draw(st.integers(0, 99)),
    }


PLAIN = {
    "kind": "split",
    "batch": 2,
    "channels": (2, 3),
    "groups": 1,
    "kernel": (3, 3),
    "stride": (2, 1),
    "padding": (1, 0),
    "dilation": (1, 2),
    "extra": (4, 3),
    "adapters": [(5, 0.5)],
    "bias": True,
    "layout": "plain",
    "wants": [True] * 10,
    "dropouts": (),
    "seed": 1,
}


def build(case):
    generator = torch.Generator().manual_seed(case["seed"])
    groups, (cin, cout) = case["groups"], case["channels"]
    size = [d * (k - 1) + 1 + e for d, k, e in zip(case["dilation"], case["kernel"], case["extra"], strict=True)]
    x = randn((case["batch"], groups * cin, *size), generator)
    if case["layout"] == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    if case["layout"] == "sliced":
        x = randn((*x.shape[:-1], 2 * x.shape[-1]), generator)[..., ::2]
    weight = randn((groups * cout, cin, *case["kernel"]), generator)
    geometry = {"stride": case["stride"], "padding": case["padding"], "dilation": case["dilation"], "groups": groups}
    plain = reference.conv(x, weight, None, (), **geometry)
    addend = randn(plain.shape if case["kind"] == "beside" else (groups * cout,), generator)
    addend = addend if case["bias"] or case["kind"] == "beside" else None
    ones = (1,) * len(case["kernel"])
    factors = [
        t
        for rank, _ in case["adapters"]
        for t in (randn((rank, *weight.shape[1:]), generator), randn((groups * cout, rank, *ones), generator))
    ]
    tensors = [x, *([] if addend is None else [addend]), *factors]
    for tensor, wanted in zip(tensors, case["wants"], strict=False):
        tensor.requires_grad_(wanted)
    return x, weight, addend, factors, geometry, tensors


@settings(max_examples=150, deadline=None)
@given(cases())
@example(PLAIN | {"kind": "merged", "groups": 3, "adapters": [(20, 1), (1, -2)]})
@example(PLAIN | {"groups": 3, "dropouts": (0.4, 0.2), "adapters": [(4, 1), (2, -2)], "layout": "channels_last"})
@example(PLAIN | {"batch": 0})
def test_convolution(case):
    x, weight, addend, factors, geometry, tensors = build(case)
    scale = tuple(s for _, s in case["adapters"])
    dropouts = case["dropouts"][: len(scale)] if case["kind"] != "merged" else ()
    torch.manual_seed(3)
    masks = [torch.nn.functional.dropout(torch.ones_like(x), p) for p in dropouts] or [None] * len(scale)
    terms = list(zip(factors[::2], factors[1::2], scale, masks, strict=True))
    if case["kind"] == "beside":
        want = addend + reference.conv(x, torch.zeros_like(weight), None, terms, **geometry)
    else:
        want = reference.conv(x, weight, addend, terms, **geometry)
    torch.manual_seed(3)
    own = Geometry(*(tuple(geometry[key]) for key in ("stride", "padding", "dilation")), geometry["groups"])
    layer = Layer(
        None if case["kind"] == "beside" else Dense(weight),
        case["kind"] == "merged",
        own,
        own,
        own.groups,
        True,
        scale,
        WIDE,
        dropouts,
    )
    got = lora_conv(x, layer, addend, factors, Dtypes(WIDE, WIDE))
    assert_close(got, want, 1e-9)
    for mine, expected in zip(gradients([got], tensors), gradients([want], tensors), strict=True):
        assert_close(mine, expected, 1e-9)


@pytest.mark.parametrize("kind", ["split", "merged"])
def test_a_weight_in_channels_last(kind):
    """The matrix that the update is added to is then a copy of the weight."""
    x, weight, addend, factors, geometry, _ = build(PLAIN | {"kind": kind})
    own = Geometry(*(tuple(geometry[key]) for key in ("stride", "padding", "dilation")), 1)
    want = reference.conv(x, weight, addend, [(*factors, 0.5, None)], **geometry)
    last = Dense(weight.contiguous(memory_format=torch.channels_last))
    layer = Layer(last, kind == "merged", own, own, 1, True, (0.5,), WIDE)
    assert_close(lora_conv(x, layer, addend, factors, Dtypes(WIDE, WIDE)), want, 1e-9)


def test_factors_that_are_not_shared_by_the_groups():
    """Stock PEFT's form: A spans all input channels, each group of output channels has its own part of the rank."""
    generator = torch.Generator().manual_seed(0)
    x, weight = randn((2, 6, 9), generator), randn((9, 2, 3), generator)
    a, b = randn((12, 6, 3), generator), randn((9, 4, 1), generator)
    tensors = [t.requires_grad_() for t in (x, a, b)]
    h = torch.nn.functional.conv1d(x, a, padding=1)
    lora = torch.nn.functional.conv1d(h, b, groups=3) * 0.7
    want = torch.nn.functional.conv1d(x, weight, padding=1, groups=3) + lora
    base, down = Geometry((1,), (1,), (1,), 3), Geometry((1,), (1,), (1,), 1)
    layer = Layer(Dense(weight), False, base, down, 3, False, (0.7,), WIDE)
    got = lora_conv(x, layer, None, [a, b], Dtypes(WIDE, WIDE))
    assert_close(got, want, 1e-9)
    for mine, expected in zip(gradients([got], tensors), gradients([want], tensors), strict=True):
        assert_close(mine, expected, 1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=3),
    st.lists(st.tuples(st.integers(1, 30), scalings), min_size=1, max_size=3),
    st.sampled_from((None, 0, 4)),
    st.sampled_from((torch.int64, torch.int32)),
    st.lists(st.booleans(), min_size=7, max_size=7),
)
@example([2, 3], [(512, 0.5)], 4, torch.int64, [True] * 7)
def test_embedding(shape, adapters, padding_idx, kind, wants):
    generator = torch.Generator().manual_seed(len(shape))
    weight = randn((11, 7), generator)
    index = torch.randint(0, 11, shape, generator=generator, dtype=kind)
    factors = [t for rank, _ in adapters for t in (randn((rank, 11), generator), randn((7, rank), generator))]
    result = torch.nn.functional.embedding(index, weight)
    tensors = [result, *factors]
    for tensor, wanted in zip(tensors, wants, strict=False):
        tensor.requires_grad_(wanted)
    scale = [s for _, s in adapters]
    want = result
    for a, b, s in zip(factors[::2], factors[1::2], scale, strict=True):
        want = want + torch.nn.functional.embedding(index, a.t(), padding_idx) @ b.t() * s
    got = lora_embedding(result, index, factors, scale, WIDE, padding_idx)
    assert_close(got, want, 1e-9)
    for mine, expected in zip(gradients([got], tensors), gradients([want], tensors), strict=True):
        assert_close(mine, expected, 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_frequent_row_is_not_summed_in_16_bits(dtype):
    """Where autocast computes in 16 bits: a sum of many small terms stops growing long before its end."""
    a, b = torch.ones(2, 3, requires_grad=True), torch.full((4, 2), 1.25, requires_grad=True)
    index = torch.tensor([0, 1]).repeat_interleave(4000)
    y = lora_embedding(torch.zeros(8000, 4), index, [a, b], [1.0], dtype)
    y.sum().backward()
    assert a.grad[:, :2].tolist() == [[20000.0] * 2] * 2
