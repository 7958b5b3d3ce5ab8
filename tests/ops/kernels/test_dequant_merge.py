import pytest
import torch

from lora_adapters.errors import RequestError
from lora_adapters.ops import kernels
from lora_adapters.weights import primitives

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Packed:
    """A random weight in 4 bits, and what bitsandbytes makes of it."""

    def __init__(self, device, out, inn, quant_type="nf4", blocksize=64, nested=True, storage=torch.uint8):
        generator = torch.Generator().manual_seed(out * inn)
        dense = torch.randn(out, inn, generator=generator).to(device)
        self.shape = torch.Size((out, inn))
        self.packed, self.state = primitives.quantize(dense, quant_type, blocksize, nested, storage)

    def nested(self):
        state = self.state
        return (state.state2.absmax, state.state2.code, state.offset) if state.nested else None

    def kernel(self, a, b, scaling, dtype):
        s = self.state
        settings = (s.absmax, s.code, self.nested(), s.blocksize, s.quant_type, self.shape)
        return kernels.dequantize_merge(self.packed, *settings, a, b, scaling, dtype)

    def dequantized(self, dtype):
        return primitives.dequantize(self.packed, self.state, self.shape, dtype)

    def merged(self, a, b, scaling, dtype):
        """The reference in fp64, rounded once."""
        return (self.dequantized(torch.float32).double() + scaling * (b.double() @ a.double())).to(dtype)


def factors(device, out, inn, rank, a_dtype, b_dtype=None):
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, inn, generator=generator) / rank**0.5
    b = torch.randn(out, rank, generator=generator)
    return a.to(device, a_dtype), b.to(device, b_dtype or a_dtype)


def assert_merged(weight, reference, dtype):
    """One rounding of a value that differs from the exact one in fp32's last bits: at most one step apart, rarely."""
    assert weight.shape == reference.shape
    assert weight.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(weight, reference, rtol=max(step, 1e-5), atol=1e-5)
    if dtype != torch.float32:
        assert (weight != reference).float().mean() < 0.02


def assert_merged_in_tf32(weight, reference, a, b, scaling):
    """The same in bf16, of an update whose fp32 factors were rounded to 11 bits."""
    update = abs(scaling) * (b.double().abs() @ a.double().abs())
    bound = torch.finfo(torch.bfloat16).eps * reference.double().abs() + 2**-10 * update + 1e-5
    assert ((weight.double() - reference.double()).abs() <= bound).all()
    assert (weight.double() - reference.double()).mean().abs() < 2**-14
    assert (weight != reference).float().mean() < 0.15


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "out, inn, blocksize",
    [(33, 192, 64), (5, 320, 32), (3, 1024, 4096), (40, 256, 256), (7, 37, 64), (9, 96, 64), (1, 1, 64), (67, 130, 32)],
)
def test_without_factors_it_is_what_bitsandbytes_dequantizes(device, out, inn, blocksize, quant_type, nested):
    """Exactly, but for the sign of FP4's second zero, in which bitsandbytes' own implementations differ."""
    weight = Packed(device, out, inn, quant_type, blocksize, nested)
    for dtype in DTYPES:
        assert torch.equal(weight.kernel(None, None, 1.0, dtype), weight.dequantized(dtype)), dtype


@pytest.mark.parametrize("a_dtype, b_dtype", [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out, inn, rank", [(33, 192, 3), (35, 75, 33)])
def test_the_update_is_added_in_fp32_and_rounded_once(device, out, inn, rank, dtype, a_dtype, b_dtype):
    weight = Packed(device, out, inn)
    a, b = factors(device, out, inn, rank, a_dtype, b_dtype)
    merged, reference = weight.kernel(a, b, -0.75, dtype), weight.merged(a, b, -0.75, dtype)
    if dtype == torch.bfloat16 and torch.float32 in (a_dtype, b_dtype):
        assert_merged_in_tf32(merged, reference, a, b, -0.75)
    else:
        assert_merged(merged, reference, dtype)


@pytest.mark.parametrize("rank", [1, 16, 17, 48, 64, 65, 100, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_rank(device, rank, dtype):
    weight = Packed(device, 40, 160)
    a, b = factors(device, 40, 160, rank, dtype)
    assert_merged(weight.kernel(a, b, 0.5, dtype), weight.merged(a, b, 0.5, dtype), dtype)


@pytest.mark.parametrize("programs", [1, 1000])
@pytest.mark.parametrize("out, inn, rank", [(200, 200, 6), (129, 136, 40), (96, 256, 0)])
def test_a_program_that_works_down_several_tiles(device, out, inn, rank, programs):
    from lora_adapters.ops.kernels import dequant_merge as module

    weight = Packed(device, out, inn)
    a, b = factors(device, out, inn, rank, torch.float32) if rank else (None, None)
    reference = weight.merged(a, b, 0.5, torch.float32) if rank else weight.dequantized(torch.float32)
    tile = module.choose_tile(rank, True, (9, 0))._replace(rows=16, cols=32, ranks=16, programs=programs)
    state = weight.state
    settings = (state.absmax, state.code, *weight.nested(), 64, out, inn, a, b, 0.5, torch.float32)
    assert_merged(module.launch(weight.packed, *settings, tile=tile), reference, torch.float32)


def test_bytes_that_start_between_words(device):
    weight = Packed(device, 8, 64)
    apart = torch.cat([weight.packed.new_zeros(1), weight.packed.view(-1)])[1:]
    assert apart.data_ptr() % 4
    expected = weight.dequantized(torch.float16)
    weight.packed = apart
    assert torch.equal(weight.kernel(None, None, 1.0, torch.float16), expected)


def test_factors_may_be_strided(device):
    weight = Packed(device, 20, 64)
    a, b = factors(device, 20, 64, 6, torch.float32)
    rows_apart = torch.cat([a, a], dim=1)[:, :64]
    transposed = b.t().contiguous().t()
    assert torch.equal(
        weight.kernel(rows_apart, transposed, 2.0, torch.float32), weight.kernel(a, b, 2.0, torch.float32)
    )


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_packed_bytes_may_be_shown_as_floats(device, storage):
    """As FSDP wants them (bnb_4bit_quant_storage)."""
    plain, shown = Packed(device, 16, 64), Packed(device, 16, 64, storage=storage)
    assert shown.packed.dtype == storage
    assert torch.equal(shown.kernel(None, None, 1.0, torch.bfloat16), plain.kernel(None, None, 1.0, torch.bfloat16))


def test_nan_and_infinity_stay_where_they_are(device):
    weight = Packed(device, 34, 130)
    a, b = factors(device, 34, 130, 5, torch.float32)
    a[2, 7], b[33, 0] = float("nan"), float("inf")
    merged = weight.kernel(a, b, 1.0, torch.float32)
    expected = torch.zeros(34, 130, dtype=torch.bool, device=device)
    expected[:, 7], expected[33] = True, True
    assert torch.equal(~merged.isfinite(), expected)
    assert merged[:33, 7].isnan().all()


def test_an_update_that_overflows_fp16_is_infinite(device):
    weight = Packed(device, 4, 64)
    a, b = factors(device, 4, 64, 2, torch.float32)
    merged, reference = weight.kernel(a, b, 1e6, torch.float16), weight.merged(a, b, 1e6, torch.float16)
    assert merged.isinf().any()
    assert torch.equal(merged.isinf(), reference.isinf())


def test_compiled_without_a_graph_break(device):
    weight = Packed(device, 16, 96)
    a, b = factors(device, 16, 96, 4, torch.float32)
    x = torch.randn(3, 96, device=device)

    def product(a, b):
        return x @ weight.kernel(a, b, 2.0, torch.float32).t() + 1

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), product(a, b))


def test_what_does_not_fit_is_refused(device):
    weight = Packed(device, 16, 64)
    a, b = factors(device, 16, 64, 4, torch.float32)
    for wrong in [(a, None), (a[:, :63], b), (a[:3], b), (a, b[:15])]:
        with pytest.raises(RequestError, match="factors"):
            weight.kernel(*wrong, 1.0, torch.float32)
    with pytest.raises(RequestError, match="int32"):
        weight.kernel(a, b, 1.0, torch.int32)
    with pytest.raises(RequestError, match="float64"):
        weight.kernel(a.double(), b, 1.0, torch.float32)
    weight.state.absmax = weight.state.absmax[:15]
    with pytest.raises(RequestError, match="block maxima"):
        weight.kernel(a, b, 1.0, torch.float32)
    weight.shape = torch.Size((16, 65))
    with pytest.raises(RequestError, match="packed bytes"):
        weight.kernel(None, None, 1.0, torch.float32)
    weight.state.quant_type = "nf5"
    with pytest.raises(RequestError, match="quant_type"):
        weight.kernel(None, None, 1.0, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("inn", [(1 << 14) + 64, (1 << 14) + 2])
def test_more_than_two_to_the_31_values(device, inn):
    """9 GB on the GPU: the last rows come out as they do alone."""
    out, rank, tail, blocksize = (1 << 17) + 64, 4, 64, 32
    packed = torch.randint(0, 256, (out * inn // 2,), dtype=torch.uint8, device=device)
    absmax = torch.rand(out * inn // blocksize, device=device)
    code = Packed(device, 1, 64).state.code
    a, b = factors(device, out, inn, rank, torch.bfloat16)

    def merged(rows):
        part = packed[-rows * inn // 2 :], absmax[-rows * inn // blocksize :]
        settings = (code, None, blocksize, "nf4", (rows, inn))
        return kernels.dequantize_merge(*part, *settings, a, b[-rows:], 0.5, torch.bfloat16)

    assert out * inn > 1 << 31
    assert torch.equal(merged(out)[-tail:], merged(tail))
