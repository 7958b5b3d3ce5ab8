"""The three ways to compute dense linear layers give the same outputs and gradients."""

import pytest
import torch

from lora_adapters.ops.frozen import Dense
from lora_adapters.ops.linear import Dtypes, Member, lora_linear
from lora_adapters.ops.plain import is_plain, plain_linear
from lora_adapters.ops.single import single_linear


def case(count, biased, scaling, dtype, shape=(3, 5, 24), transposed=False):
    generator = torch.Generator().manual_seed(0)

    def made(*size):
        return torch.randn(size, generator=generator).to(dtype)

    x = made(*shape).requires_grad_()
    weights = [made(24, 10 + i) if transposed else made(10 + i, 24) for i in range(count)]
    members = [Member(Dense(w, transposed), False, (scaling,), dtype) for w in weights]
    biases = [made(10 + i).requires_grad_() if biased else None for i in range(count)]
    factors = [t.requires_grad_() for i in range(count) for t in (made(3 + i, 24), made(10 + i, 3 + i))]
    return x, members, biases, factors, Dtypes(dtype, dtype)


def outcome(function, x, members, biases, factors, dtypes, used=None):
    outputs = function(x, members, biases, factors, dtypes)
    wanted = [t for t in (x, *biases, *factors) if t is not None]
    chosen = outputs if used is None else [outputs[i] for i in used]
    loss = sum((y * torch.arange(y.shape[-1], dtype=y.dtype)).sum() for y in chosen)
    return [*outputs, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24), (24,), (2, 1, 3, 24), (0, 24)], ids=str)
@pytest.mark.parametrize("scaling", [1.0, -0.5])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_plain_as_the_function_of_our_own(count, biased, scaling, shape):
    given = case(count, biased, scaling, torch.float64, shape)
    assert is_plain(given[1], given[3], given[4])
    expected = outcome(lora_linear, *given)
    assert_same(outcome(plain_linear, *given), expected, 1e-12)
    if count == 1:

        def single(x, members, biases, factors, dtypes):
            member = members[0]
            return (
                single_linear(x, member.weight, False, biases[0], *factors, *member.scalings, *dtypes, member.output),
            )

        assert_same(outcome(single, *given), expected, 1e-12)


def test_transposed_weights_and_unused_outputs():
    given = case(3, True, 2.0, torch.float64, transposed=True)
    assert_same(outcome(plain_linear, *given, used=(0, 2)), outcome(lora_linear, *given, used=(0, 2)), 1e-12)


def test_an_output_may_be_written_to():
    x, members, biases, factors, dtypes = case(1, False, 1.0, torch.float64)
    (y,) = plain_linear(x, members, biases, factors, dtypes)
    torch.relu_(y).sum().backward()
    written = factors[0].grad.clone()
    factors[0].grad = None
    (y,) = plain_linear(x, members, biases, factors, dtypes)
    torch.relu(y).sum().backward()
    assert torch.equal(written, factors[0].grad)


def test_it_can_be_differentiated_twice():
    x, members, biases, factors, dtypes = case(1, True, 2.0, torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x, bias, a, b: plain_linear(x, members, [bias], [a, b], dtypes)[0], (x, biases[0], *factors)
    )


def test_what_it_leaves_to_others():
    _, members, _, factors, dtypes = case(1, False, 1.0, torch.float32)
    assert not is_plain(members, factors, Dtypes(torch.bfloat16, torch.bfloat16))  # a cast of W would be kept
    assert not is_plain(members, factors, Dtypes(torch.float32, torch.float64))
    assert not is_plain([members[0]._replace(dropouts=(0.1,))], factors, dtypes)
    assert not is_plain([members[0]._replace(merged=True)], factors, dtypes)
    assert not is_plain([members[0]._replace(weight=None)], factors, dtypes)
