"""Learning-rate schedules and the weights that correct for a mismatched sampler, against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.algorithm.mismatch import mismatch_weights
from retrain.algorithm.schedule import learning_rate


def rates(schedule, *, warmup=0, steps=10, base=2.0):
    return [learning_rate(s, base=base, schedule=schedule, warmup_steps=warmup, max_steps=steps) for s in range(steps)]


def test_constant():
    assert rates("constant") == [2.0] * 10


def test_linear():
    assert rates("linear", steps=4) == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_cosine():
    assert rates("cosine", steps=4) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_linearly_to_the_base_rate(schedule):
    got = rates(schedule, warmup=4)
    assert got[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert got[4] == 2.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_over_the_whole_run_and_beyond(schedule):
    assert rates(schedule, warmup=10)[-1] == 2.0
    assert rates(schedule, warmup=20)[-1] == pytest.approx(1.0)


@settings(max_examples=50, deadline=None)
@given(warmup=st.integers(0, 30), steps=st.integers(1, 40), schedule=st.sampled_from(["constant", "linear", "cosine"]))
def test_every_step_learns_and_none_above_the_base_rate(warmup, steps, schedule):
    got = rates(schedule, warmup=warmup, steps=steps)
    assert all(0 < rate <= 2.0 for rate in got)
    after = got[warmup:]
    assert after == sorted(after, reverse=True)
    end = learning_rate(max(steps, warmup), base=2.0, schedule=schedule, warmup_steps=warmup, max_steps=steps)
    assert end == (2.0 if schedule == "constant" or warmup >= steps else pytest.approx(0.0, abs=1e-12))


# ---- mismatch -----------------------------------------------------------------------------------------------------

RATIOS = [[0.5, 1.0, 3.0], [], [2.0], [1.5, 1.6]]


def weights(kind, cap=2.0):
    lengths = [len(row) for row in RATIOS]
    sampler = torch.linspace(-3, -1, sum(lengths))
    trainer = sampler + torch.tensor([ratio for row in RATIOS for ratio in row]).log()
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    return mismatch_weights(trainer.requires_grad_(), sampler, cu_seqlens, kind=kind, cap=cap)


@pytest.mark.parametrize(
    ("kind", "cap", "want"),
    [
        ("token", 2.5, [0.5, 1.0, 2.5, 2.0, 1.5, 1.6]),
        ("sequence", 2.2, [1.5, 1.5, 1.5, 2.0, 2.2, 2.2]),
        ("mask", 1.55, [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]),
    ],
)
def test_weights(kind, cap, want):
    got = weights(kind, cap)
    torch.testing.assert_close(got, torch.tensor(want))
    assert not got.requires_grad


def test_without_correction_there_are_no_weights():
    assert weights("none") is None


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_extreme_ratios_stay_finite(kind):
    far = torch.tensor([500.0, -500.0])
    cu_seqlens = torch.tensor([0, 1, 2])
    got = mismatch_weights(far, torch.zeros(2), cu_seqlens, kind=kind, cap=1e30)
    torch.testing.assert_close(got, torch.tensor([math.exp(20), math.exp(-20)]))
