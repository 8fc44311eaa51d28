"""The algebra of a squeeze against a dense SVD in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.squeeze.lowrank import decompose, retained, truncate
from squeeze_adapters import truncated


@st.composite
def factor_pairs(draw):
    """(b [E, O, R], a [E, R, I]) of any shapes and ranks, spectra from flat to steep, B perhaps partly zero."""
    count, rank = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    outputs, inputs = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    decay = draw(st.floats(0, 8)) / rank
    b = torch.randn(count, outputs, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(count, rank, inputs, generator=generator, dtype=torch.float64)
    b = b * torch.exp(-decay * torch.arange(rank)) * 10.0 ** draw(st.integers(-6, 3))
    b[:, :, : draw(st.integers(0, rank))] = 0
    return b, a


def pair(count=1, outputs=9, rank=6, inputs=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(count, outputs, rank, generator=generator, dtype=torch.float64)
    return b, torch.randn(count, rank, inputs, generator=generator, dtype=torch.float64)


@settings(max_examples=150, deadline=None)
@given(factor_pairs(), st.data())
def test_spectrum_and_truncation_are_those_of_a_dense_svd(factors, data):
    b, a = factors
    rank = a.shape[1]
    k = data.draw(st.integers(1, rank))
    parts = decompose(b, a)
    dense = b @ a
    reference = torch.linalg.svdvals(dense)
    top = reference.max().item()
    expected = torch.zeros(len(b), rank, dtype=torch.float64)
    shared = min(rank, reference.shape[1])
    expected[:, :shared] = reference[:, :shared]
    torch.testing.assert_close(parts.values_ER, expected, rtol=0, atol=1e-12 * top)

    small = truncate(parts, k)
    assert small.a_EKI.shape == (len(b), k, a.shape[2])
    assert small.b_EOK.shape == (len(b), b.shape[1], k)
    product = small.b_EOK @ small.a_EKI
    # As good as the best there is; where singular values are equal, the best is not unique.
    error = (dense - product).square().sum().item()
    best = (dense - truncated(dense, k)).square().sum().item()
    total = dense.square().sum().item()
    assert error <= best + 1e-12 * total
    # The relative error is exactly 1 - V(k).
    kept = retained(parts.values_ER)
    assert kept.shape == (rank,)
    if total > 0:
        assert 1 - kept[k - 1].item() == pytest.approx(error / total, abs=1e-6)
    else:
        assert kept.tolist() == [1.0] * rank


def test_truncation_is_that_of_a_dense_svd_where_it_is_unique():
    b, a = pair(count=2)
    for k in range(1, 7):
        small = truncate(decompose(b, a), k)
        torch.testing.assert_close(small.b_EOK @ small.a_EKI, truncated(b @ a, k), rtol=0, atol=1e-12)


def test_retained_counts_all_stacked_maps_together():
    values = torch.tensor([[3.0, 0.0], [0.0, 0.0], [2.0, 1.0]])
    assert retained(values).tolist() == pytest.approx([13 / 14, 1.0])


def test_the_new_factors_are_those_of_the_old_times_what_is_said():
    b, a = pair(count=2)
    small = truncate(decompose(b, a), 4)
    torch.testing.assert_close(small.by_a_EKR @ a, small.a_EKI, rtol=0, atol=1e-12)
    torch.testing.assert_close(b @ small.by_b_ERK, small.b_EOK, rtol=0, atol=1e-12)


def test_the_rows_of_the_new_a_are_orthogonal_and_of_the_old_ones_size():
    b, a = pair()
    new = truncate(decompose(b, a), 4).a_EKI[0]
    size = a[0].square().sum(1).mean().item()
    torch.testing.assert_close(new @ new.mT, size * torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 6, 11), (3, 6, 11), (9, 6, 4)], ids=["tall", "few outputs", "few inputs"])
def test_what_nothing_was_learned_in_can_still_learn(shape):
    """B of zeros, as an adapter begins: the update is zero, and the gradient of the new B is not."""
    outputs, rank, inputs = shape
    b, a = pair(outputs=outputs, rank=rank, inputs=inputs)
    small = truncate(decompose(torch.zeros_like(b), a), 3)
    assert not small.b_EOK.any()
    assert (small.a_EKI.norm(dim=-1) > 0.1).all()


def test_factors_of_zeros():
    b, a = pair()
    small = truncate(decompose(torch.zeros_like(b), torch.zeros_like(a)), 3)
    assert not (small.b_EOK @ small.a_EKI).any()
    assert (small.a_EKI.norm(dim=-1) > 0.1).all()


def test_more_rank_than_inputs_is_padded():
    b, a = pair(outputs=9, rank=6, inputs=4)
    small = truncate(decompose(b, a), 5)
    assert small.a_EKI.shape == (1, 5, 4)
    torch.testing.assert_close(small.b_EOK @ small.a_EKI, b @ a, rtol=0, atol=1e-12)


def test_half_precision_is_computed_in_float64():
    b, a = pair()
    b, a = b.bfloat16(), a.bfloat16()
    parts = decompose(b, a)
    expected = torch.linalg.svdvals(b.double() @ a.double())[:, :6]
    torch.testing.assert_close(parts.values_ER, expected, rtol=0, atol=1e-12)
