import pytest
import torch

from lora_adapters.errors import RequestError
from lora_adapters.ops import kernels

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: tokens, features, rank: no multiples of a tile, single values, several parts, ranks around the choice of torch.mm.
SHAPES = [
    (1, 1, 1),
    (5, 37, 3),
    (33, 130, 16),
    (300, 70, 17),
    (70, 300, 32),
    (64, 256, 8),
    (40, 75, 33),
    (130, 90, 100),
]
#: Two dtypes of the long operand and of the factor, the same and mixed.
MIXES = [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F16, BF16)]


def normal(device, *shape, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def assert_product(result, left, right, dtype, scaling=1.0):
    """The product in fp64, rounded once. Sums in another order differ by parts of the sum of magnitudes."""
    exact = scaling * (left.double() @ right.double())
    magnitude = abs(scaling) * (left.double().abs() @ right.double().abs())
    assert result.dtype == dtype
    assert result.shape == exact.shape
    assert result.is_contiguous()
    bound = 4e-6 * magnitude + torch.finfo(dtype).eps * exact.abs() + 1e-30
    assert ((result.double() - exact).abs() <= bound).all(), ((result.double() - exact).abs() / bound).max()


@pytest.mark.parametrize("long, short", MIXES)
@pytest.mark.parametrize("tokens, features, rank", SHAPES)
def test_down(device, tokens, features, rank, long, short):
    x, a = normal(device, tokens, features, dtype=long), normal(device, rank, features, dtype=short, seed=1)
    for dtype in (F32, short):
        assert_product(kernels.down(x, a, dtype), x, a.t(), dtype)


@pytest.mark.parametrize("h_dtype, dtype", [(F32, BF16), (F32, F16), (F32, F32), (BF16, F16), (F16, F32)])
@pytest.mark.parametrize("tokens, features, rank", SHAPES)
@pytest.mark.parametrize("bias_dtype", [None, F32, BF16])
def test_up(device, tokens, features, rank, h_dtype, dtype, bias_dtype):
    h, b = normal(device, tokens, rank, dtype=h_dtype), normal(device, features, rank, seed=1)
    bias = None if bias_dtype is None else normal(device, features, dtype=bias_dtype)
    y = kernels.up(h, b, bias, dtype, -1.5)
    assert y.dtype == dtype
    assert y.is_contiguous()
    exact = -1.5 * (h.double() @ b.double().t()) + (0 if bias is None else bias.double())
    magnitude = 1.5 * (h.double().abs() @ b.double().abs().t()) + (0 if bias is None else bias.double().abs())
    assert ((y.double() - exact).abs() <= 4e-6 * magnitude + torch.finfo(dtype).eps * exact.abs()).all()
    # As dh @ a, whose b is the transpose of a contiguous matrix.
    assert torch.equal(kernels.up(h, b.t().contiguous().t(), bias, dtype, -1.5), y)


@pytest.mark.parametrize("h_dtype, dtype", [(F32, BF16), (F32, F16), (F32, F32), (BF16, F16), (F16, F32)])
@pytest.mark.parametrize("tokens, features, rank", SHAPES)
def test_add_up_rounds_the_sum_once(device, tokens, features, rank, h_dtype, dtype):
    h, b = normal(device, tokens, rank, dtype=h_dtype), normal(device, features, rank, seed=1)
    y = normal(device, tokens, features, dtype=dtype, seed=2)
    exact = y.double() - 1.5 * (h.double() @ b.double().t())
    magnitude = y.double().abs() + 1.5 * (h.double().abs() @ b.double().abs().t())
    assert kernels.add_up(y, h, b, -1.5) is y
    assert ((y.double() - exact).abs() <= 4e-6 * magnitude + torch.finfo(dtype).eps / 2 * exact.abs()).all()


@pytest.mark.parametrize("long, short", MIXES)
@pytest.mark.parametrize("tokens, features, rank", SHAPES)
def test_up_grads(device, tokens, features, rank, long, short):
    dy = normal(device, tokens, features, dtype=long)
    h, b = normal(device, tokens, rank, dtype=short, seed=1), normal(device, features, rank, dtype=short, seed=2)
    dh, db = kernels.up_grads(dy, h, b, -1.5)
    assert_product(dh, dy, b, short, -1.5)
    assert_product(db, dy.t(), h, F32, -1.5)


@pytest.mark.parametrize("long, short", MIXES)
@pytest.mark.parametrize("tokens, features, rank", SHAPES)
def test_down_grad(device, tokens, features, rank, long, short):
    dh, x = normal(device, tokens, rank, dtype=short, seed=1), normal(device, tokens, features, dtype=long)
    assert_product(kernels.down_grad(dh, x), dh.t(), x, F32)


def test_three_dtypes_at_once(device):
    dy, h, b = normal(device, 40, 50, dtype=BF16), normal(device, 40, 6, dtype=F16), normal(device, 50, 6)
    dh, db = kernels.up_grads(dy, h, b, 2.0)
    assert_product(dh, dy, b, F16, 2.0)
    assert_product(db, dy.t(), h, F32, 2.0)


def test_long_rows_are_cut_into_parts(device):
    x, a = normal(device, 3, 6200), normal(device, 5, 6200, seed=1)
    assert_product(kernels.down(x, a, F32), x, a.t(), F32)


@pytest.mark.parametrize("rank", [1, 64, 512])
@pytest.mark.parametrize("short", [F32, BF16])
def test_every_rank_also_with_other_dtypes(device, rank, short):
    x, a = normal(device, 20, 40, dtype=BF16), normal(device, rank, 40, dtype=short, seed=1)
    h, b = normal(device, 20, rank, dtype=short, seed=2), normal(device, 40, rank, dtype=short, seed=3)
    assert_product(kernels.down(x, a, F32), x, a.t(), F32)
    assert_product(kernels.down_grad(h, x), h.t(), x, F32)
    dh, db = kernels.up_grads(x, h, b, 1.0)
    assert_product(dh, x, b, short)
    assert_product(db, x.t(), h, F32)


@pytest.mark.parametrize("rank", [6, 40])
def test_no_tokens(device, rank):
    x, a, b = normal(device, 0, 50), normal(device, rank, 50), normal(device, 50, rank)
    assert kernels.down(x, a, BF16).shape == (0, rank)
    h = x.new_empty(0, rank)
    dh, db = kernels.up_grads(x, h, b, 1.0)
    assert dh.shape == (0, rank)
    assert torch.equal(db, torch.zeros(50, rank, device=device))
    assert torch.equal(kernels.down_grad(h, x), torch.zeros(rank, 50, device=device))
    assert kernels.up(h, b, None, BF16).shape == (0, 50)


@pytest.mark.parametrize("how", ["columns of a wider tensor", "every second row", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_strided_operands(device, how, dtype):
    wide = normal(device, 80, 90, dtype=dtype)
    x = {
        "columns of a wider tensor": wide[:40, 3:53],
        "every second row": wide[::2, :50],
        "transposed": wide[:50, :40].t(),
        "expanded": wide[:1, :1].expand(40, 50),
    }[how]
    a = normal(device, 50, 6, dtype=dtype).t()
    h, b = normal(device, 6, 40, dtype=dtype).t(), normal(device, 6, 50, dtype=dtype, seed=1).t()
    assert_product(kernels.down(x, a, F32), x, a.t(), F32)
    assert_product(kernels.down_grad(h, x), h.t(), x, F32)
    dh, db = kernels.up_grads(x, h, b, 1.0)
    assert_product(dh, x, b, dtype)
    assert_product(db, x.t(), h, F32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank", [5, 40])
@pytest.mark.parametrize("long", [F32, BF16, F16])
def test_nan_and_infinity_reach_what_they_reach_in_torch(device, bad, rank, long):
    x, a = normal(device, 70, 90, dtype=long), normal(device, rank, 90, seed=1)
    h, b = normal(device, 70, rank, seed=2), normal(device, 90, rank, seed=3)
    # One is 1 exactly: what is left of it beyond 16 bits is 0, and 0 times infinity must not count.
    x[69, 89], h[3, 1], a[1, 89], b[89, 2] = bad, bad, 1, -1
    wide = x.float()
    pairs = [(kernels.down(x, a, F32), wide @ a.t()), (kernels.down_grad(h, x), h.t() @ wide)]
    pairs += zip(kernels.up_grads(x, h, b, 1.0), (wide @ b, wide.t() @ h), strict=True)
    pairs += [(kernels.up(h, b, None, BF16), h @ b.t())]
    for result, expected in pairs:
        assert not expected.isfinite().all()
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.isinf(), expected.isinf())


def test_the_same_bits_every_time(device):
    dy, h, b = (
        normal(device, 700, 300, dtype=F16),
        normal(device, 700, 16, dtype=F16),
        normal(device, 300, 16, dtype=F16),
    )
    first, again = kernels.up_grads(dy, h, b, 1.0), kernels.up_grads(dy, h, b, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.equal(kernels.down_grad(h, dy), kernels.down_grad(h, dy))


@pytest.mark.parametrize("rank", [6, 40])
def test_compiled_without_a_graph_break(device, rank, monkeypatch):
    x, a, b = normal(device, 20, 30), normal(device, rank, 30), normal(device, 30, rank)

    # The first question may be asked while torch.compile traces; then kernels are imported there.
    monkeypatch.setattr(kernels, "_ANSWERS", {})

    def everything(x):
        assert kernels.available(x.device)
        h = kernels.down(x + 1, a, F32)
        dh, db = kernels.up_grads(x, h, b, 0.5)
        return h * 2, dh, db + 1, kernels.down_grad(dh, x), kernels.up(h, b, x[0], F16, 2.0)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (20, 11):
        torch.testing.assert_close(compiled(x[:tokens]), everything(x[:tokens]))


def test_what_does_not_fit_is_refused(device):
    x, a, h, b = (normal(device, *shape) for shape in [(9, 20), (4, 20), (9, 4), (20, 4)])
    with pytest.raises(RequestError, match=r"x \(9, 19\)"):
        kernels.down(x[:, :19], a, F32)
    for wrong in [(x[:8], h, b), (x[:, :19], h, b), (x, h[:, :3], b)]:
        with pytest.raises(RequestError, match="dy"):
            kernels.up_grads(*wrong, 1.0)
    for wrong in [(h[:, :3], b, None), (h, b, x[0, :19])]:
        with pytest.raises(RequestError, match="h"):
            kernels.up(*wrong, BF16)
    with pytest.raises(RequestError, match="y"):
        kernels.add_up(x[:8], h, b)
    with pytest.raises(RequestError, match="contiguous"):
        kernels.add_up(x.t().contiguous().t(), h, b)
    with pytest.raises(RequestError, match="int32"):
        kernels.up(h, b, None, torch.int32)
    with pytest.raises(RequestError, match="dh"):
        kernels.down_grad(h[:8], x)
    with pytest.raises(RequestError, match="float64"):
        kernels.down(x.double(), a, F32)
    assert kernels.available(device, F32, BF16, F16)
    assert not kernels.available(device, F32, torch.float64)


@pytest.mark.gpu
def test_more_than_two_to_the_31_values(device):
    """9 GB on the GPU: the last rows come out as they do alone."""
    tokens, features, rank, tail = (1 << 17) + 40, (1 << 14) + 16, 16, 64
    x = torch.zeros(tokens, features, device=device, dtype=BF16)
    x[-tail:] = normal(device, tail, features, dtype=BF16)
    a, b = normal(device, rank, features, dtype=BF16), normal(device, features, rank, dtype=BF16)
    h = normal(device, tokens, rank, dtype=BF16)
    assert x.numel() > 1 << 31
    (dh, db), (dh_tail, db_tail) = kernels.up_grads(x, h, b, 1.0), kernels.up_grads(x[-tail:], h[-tail:], b, 1.0)
    pairs = [
        (kernels.down(x, a, F32)[-tail:], kernels.down(x[-tail:], a, F32)),
        (kernels.down_grad(h, x), kernels.down_grad(h[-tail:], x[-tail:])),
        (dh[-tail:], dh_tail),
        (db, db_tail),
    ]
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, rtol=0.02, atol=0.01)
