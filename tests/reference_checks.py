"""What the tests against `ops.reference` share."""

import torch
from hypothesis import strategies as st

#: Factors of an adapter: nothing, negative, whole numbers.
scalings = st.sampled_from([0, 1, 2, -1.5, 0.37, 0.0])


def randn(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_close(got, want, tolerance):
    """Both None; or the norm of the difference is at most `tolerance` times the norm of what is wanted."""
    assert (got is None) == (want is None), (got, want)
    if want is not None:
        assert got.shape == want.shape
        error, size = (got.double() - want.double()).norm(), want.double().norm()
        assert error <= tolerance * size + 1e-30, (error.item(), size.item())


def gradients(outputs, tensors, seed=5):
    """Gradients of all tensors (None for those that need none), for random gradients of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [(y, torch.randn(y.shape, generator=generator).to(y.dtype)) for y in outputs]
    pairs = [(y, dy) for y, dy in pairs if y.requires_grad]
    wanted = [t for t in tensors if t.requires_grad]
    if not pairs or not wanted:
        return [None] * len(tensors)
    found = iter(torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs], allow_unused=True))
    return [next(found) if t.requires_grad else None for t in tensors]
