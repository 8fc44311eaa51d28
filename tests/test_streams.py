"""Random streams: a function of their key alone, uniform, and the same in every version of the code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from retrain.streams import generator, stream_key, uniforms

KEYS = st.integers(0, 2**64 - 1)


def test_keys_are_pinned():
    """Another value here makes every recorded run irreproducible: that must not happen unnoticed."""
    assert stream_key(7, "sample", 0, 0, 0) == 6264747014285025772
    assert stream_key(7, "data", 3) == 2174732502403017433
    assert stream_key(0) == 8493733112532773764


def test_numbers_are_pinned():
    assert generator(stream_key(7, "data", 0)).permutation(8).tolist() == [0, 2, 5, 1, 7, 3, 6, 4]
    # Multiples of 2^-24, so that float32 holds them exactly.
    row = uniforms(np.array([stream_key(7, "sample", 0, 0, 0)], dtype=np.uint64), 4)[0]
    assert (row * 2**24).tolist() == [3471498, 2495459, 32250, 10825866]


def test_parts_and_seed_all_matter():
    keys = {
        stream_key(seed, kind, step, prompt, completion)
        for seed in range(3)
        for kind in ("sample", "eval", "data")
        for step in range(5)
        for prompt in range(5)
        for completion in range(5)
    }
    assert len(keys) == 3 * 3 * 125
    # Parts are kept apart: moving a digit from one to the next is another stream.
    assert stream_key(1, "a", 12, 3) != stream_key(1, "a", 1, 23)
    assert stream_key(1, 2) != stream_key(12)


@settings(max_examples=50)
@given(keys=st.lists(KEYS, min_size=1, max_size=8), count=st.integers(1, 33), data=st.data())
def test_a_row_depends_on_its_key_alone(keys, count, data):
    """Whatever else is in the batch, in which order, and however many numbers are drawn."""
    rows = uniforms(np.array(keys, dtype=np.uint64), count)
    assert rows.shape == (len(keys), count)
    assert rows.dtype == np.float32
    assert ((rows >= 0) & (rows < 1)).all()
    order = data.draw(st.permutations(range(len(keys))))
    again = uniforms(np.array([keys[i] for i in order], dtype=np.uint64), count + data.draw(st.integers(0, 70)))
    np.testing.assert_array_equal(again[:, :count], rows[order])


@pytest.mark.parametrize("across", ["one stream", "first numbers of many streams"])
def test_uniform(across):
    if across == "one stream":
        numbers = uniforms(np.array([stream_key(1, "sample", 2, 3, 4)], dtype=np.uint64), 50_000)[0]
    else:
        keys = [stream_key(1, "sample", step, p, g) for step in range(20) for p in range(10) for g in range(50)]
        numbers = uniforms(np.array(keys, dtype=np.uint64), 1)[:, 0]
    assert stats.kstest(numbers.astype(np.float64), "uniform").pvalue > 1e-3


def test_neighbouring_streams_are_not_correlated():
    rows = uniforms(np.array([stream_key(5, "sample", 0, 0, g) for g in range(30)], dtype=np.uint64), 4000)
    correlation = np.corrcoef(rows.astype(np.float64)) - np.eye(30)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)
