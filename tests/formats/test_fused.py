"""Joining the adapters of q, k and v into the one of a fused projection, and splitting it again."""

from dataclasses import replace

import pytest
import torch
from format_models import loha, lokr, lora, values
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_adapters.errors import UnsupportedError
from lora_adapters.formats.factors import LoraFactors
from lora_adapters.formats.fused import Part, join, rows, split, swap_halves

INSIDE = 5
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ALPHAS = st.sampled_from([0.5, 1.0, 3.0, 4.0, 7.25, 1e-3])


def part(size, rank, alpha, dtype=torch.float32, seed=0, **more):
    return lora((size, INSIDE), rank, alpha, seed, dtype, **more)


@st.composite
def fused_layers(draw):
    sizes = draw(st.sampled_from([(3, 3, 3), (4, 4, 4, 7)]))
    parts = []
    for index, size in enumerate(sizes):
        if draw(st.booleans()) or (index == len(sizes) - 1 and not any(parts)):
            stabilised = draw(st.booleans())
            rank, dtype = draw(st.integers(1, 4)), draw(st.sampled_from(DTYPES))
            parts.append(part(size, rank, draw(ALPHAS), dtype, index, rank_stabilised=stabilised))
        else:
            parts.append(None)
    return sizes, parts


@settings(max_examples=150, deadline=None)
@given(fused_layers())
def test_joined_is_each_layer_in_its_rows(layers):
    sizes, parts = layers
    joined, _, error = join(parts, sizes)
    wanted = torch.cat(
        [
            torch.zeros(size, INSIDE).double() if one is None else one.update()
            for one, size in zip(parts, sizes, strict=True)
        ]
    )
    assert (joined.update() - wanted).norm() <= (2 * error + 1e-14) * wanted.norm()


@settings(max_examples=150, deadline=None)
@given(fused_layers())
def test_split_by_its_record_gives_back_every_bit_that_16_bits_hold(layers):
    sizes, parts = layers
    joined, record, error = join(parts, sizes)
    for wanted, found in zip(parts, split(joined, sizes, record), strict=True):
        if wanted is None:
            assert found is None or not found.update().any()
            continue
        assert (found.alpha, found.rank_stabilised, found.rank) == (wanted.alpha, wanted.rank_stabilised, wanted.rank)
        assert torch.equal(found.a, wanted.a)
        assert found.a.dtype == wanted.a.dtype
        if not error or wanted.b.element_size() == 2:
            assert torch.equal(found.b, wanted.b)
        else:
            assert torch.allclose(found.b, wanted.b, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1.0, 3.0, 8.0]), st.sampled_from(DTYPES))
def test_equal_ranks_and_scalings_are_exact_without_a_record(rank, alpha, dtype):
    sizes = (3, 3, 3)
    parts = [part(3, rank, alpha, dtype, seed) for seed in range(3)]
    joined, _, error = join(parts, sizes)
    assert error == 0
    for wanted, found in zip(parts, split(joined, sizes), strict=True):
        assert found.alpha == pytest.approx(wanted.alpha, rel=1e-15)
        assert torch.equal(found.a, wanted.a)
        assert torch.equal(found.b, wanted.b)


def test_different_ranks_of_one_scaling_are_found_by_their_zeros():
    sizes, parts = (3, 3, 3), [part(3, rank, 2 * rank, seed=rank) for rank in (1, 3, 2)]
    joined, _, _ = join(parts, sizes)
    assert joined.rank == 6
    found = split(joined, sizes)
    assert [one.rank for one in found] == [1, 3, 2]
    assert all(torch.equal(one.b, wanted.b) for one, wanted in zip(found, parts, strict=True))


def test_one_a_for_all_stays_one():
    a = values(2, INSIDE)
    parts = [LoraFactors(a=a.clone(), b=values(3, 2, seed=seed), alpha=3.0) for seed in range(3)]
    joined, record, error = join(parts, (3, 3, 3))
    assert joined.rank == 2
    assert error == 0
    for found in (split(joined, (3, 3, 3), record), split(joined, (3, 3, 3))):
        for wanted, one in zip(parts, found, strict=True):
            assert torch.equal(one.a, a)
            assert torch.equal(one.b, wanted.b)
            assert one.alpha == 3.0


def test_a_fused_layer_that_was_trained_as_one_splits_exactly():
    factors = lora((9, INSIDE), 4, 6.0)
    found = split(factors, (3, 3, 3))
    assert torch.equal(torch.cat([one.update() for one in found]), factors.update())
    again, _, _ = join(found, (3, 3, 3))
    assert torch.equal(again.a, factors.a)
    assert torch.equal(again.b, factors.b)
    assert again.alpha == 6.0


def test_a_record_of_another_file_is_passed_over():
    factors = lora((9, INSIDE), 4, 6.0)
    record = [Part(3, 1.0), Part(3, 1.0), Part(3, 1.0)]
    found = split(factors, (3, 3, 3), record)
    assert torch.allclose(torch.cat([one.update() for one in found]), factors.update())


def test_a_fresh_b_of_zeros_splits():
    factors = replace(lora((9, INSIDE), 6, 6.0), b=torch.zeros(9, 6))
    assert [one.rank for one in split(factors, (3, 3, 3))] == [2, 2, 2]
    factors = replace(lora((9, INSIDE), 4, 4.0), b=torch.zeros(9, 4))
    assert [one.rank for one in split(factors, (3, 3, 3))] == [4, 4, 4]


@pytest.mark.parametrize("make", [lambda: loha((12, INSIDE * 4)), lambda: lokr((12, 20)), lambda: lora((12, 20))])
def test_rows_and_halves_of_every_kind(make):
    factors = make()
    update = factors.update()
    scale = update.abs().max()
    assert (rows(factors, 3, 9).update() - update[3:9]).abs().max() <= 1e-6 * scale
    swapped = swap_halves(factors).update()
    assert (swapped - torch.cat([update[6:], update[:6]])).abs().max() <= 1e-6 * scale


def test_magnitudes_are_split_and_joined_with_their_rows():
    parts = [part(3, 2, 2.0, seed=seed, magnitude=values(3, seed=seed + 9)) for seed in range(3)]
    joined, record, _ = join(parts, (3, 3, 3))
    assert torch.equal(joined.magnitude, torch.cat([one.magnitude for one in parts]))
    found = split(joined, (3, 3, 3), record)
    assert all(torch.equal(one.magnitude, wanted.magnitude) for one, wanted in zip(found, parts, strict=True))


def test_a_magnitude_of_some_layers_only_has_no_fused_form():
    parts = [part(3, 2, 2.0, magnitude=values(3)), part(3, 2, 2.0), None]
    with pytest.raises(UnsupportedError, match="some have a magnitude and others have not"):
        join(parts, (3, 3, 3))
    with pytest.raises(UnsupportedError, match="for each input"):
        rows(part(4, 2, 2.0, magnitude=values(INSIDE), magnitude_axis="input"), 0, 2)
