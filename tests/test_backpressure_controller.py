"""The batch size of each step: the rules by hand, what must hold whatever is measured, and simulated machines."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.backpressure import Controller, Usl, open_controller, simulate
from retrain.backpressure import controller as rules
from retrain.backpressure.controller import WINDOW, State, decide, observe
from retrain.backpressure.roofline import intensity, open_roofline
from retrain.backpressure.simulation import POLICIES, Machine, Trace
from retrain.config import BackpressureConfig
from retrain.config.build import build
from retrain.estimate import ModelShape
from retrain.streams import generator, stream_key
from retrain.training.metrics import BACKPRESSURE
from retrain.types import RetrainError

GROUP = 4


def section(**keys):
    return BackpressureConfig.model_validate({"enabled": True, "warmup_steps": 4, **keys})


def measured(law, sizes=(1, 2, 4, 8, 16, 32, 64), *, batch_size=8, throttled=False):
    """A state after a warm-up in which these sizes had exactly the law's throughput."""
    window = tuple((size, law.throughput(size * GROUP)) for size in sizes)
    return State(batch_size, steps=100, throttled=throttled, window=window)


def peaking_at(batch_size, sigma=0.02):
    """A law whose p* is that of `batch_size` prompts."""
    return Usl(50.0, sigma, (1 - sigma) / (batch_size * GROUP) ** 2)


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("least", "most", "sizes"),
    [
        (1, 64, [1, 2, 4, 8, 16, 32, 64]),
        (3, 20, [3, 4, 8, 16, 20]),
        (1, 3, [1, 2, 3]),
        (4, 6, [4, 5, 6]),
        (7, 8, [7, 8]),
        (5, 5, [5]),
    ],
)
def test_warm_up_tries_growing_sizes_and_leaves_the_batch_size_alone(least, most, sizes):
    keys = section(min_batch_size=least, max_batch_size=most, warmup_steps=9)
    state = State(least)
    for step in range(9):
        decision = decide(state, keys, GROUP)
        assert (decision.batch_size, decision.action, decision.law) == (sizes[step % len(sizes)], "warmup", None)
        state = observe(state, decision, 10.0 + step)
    assert state.batch_size == least


def test_warm_up_goes_on_until_three_sizes_are_measured():
    state, sizes = State(8), []
    for measured_at in (None, 5.0, None, None, 7.0, 9.0):
        decision = decide(state, section(warmup_steps=1), GROUP)
        assert decision.action == "warmup"
        sizes.append(decision.batch_size)
        state = observe(state, decision, measured_at)
    assert sizes == [1, 2, 4, 8, 16, 32]
    assert state.window == ((2, 5.0), (16, 7.0), (32, 9.0))
    assert decide(state, section(warmup_steps=1), GROUP).action != "warmup"


@pytest.mark.parametrize(
    ("peak", "size", "want"),
    [
        (20.5, 64, (17, "throttle", "retrograde")),  # 0.85 * 20.5 = 17.4
        (20.5, 18, (17, "throttle", "retrograde")),
        (20.5, 17, (17, "hold", "peak")),
        (20.5, 9, (9, "hold", "peak")),  # not below 0.5 * 17.4
        (20.5, 8, (17, "increase", "rising")),
        (200, 8, (64, "increase", "rising")),  # within max
        (200, 64, (64, "hold", "rising")),
        (0.5, 8, (1, "throttle", "retrograde")),  # within min
        (0.5, 1, (1, "hold", "retrograde")),
    ],
)
def test_decisions_by_hand(peak, size, want):
    decision = decide(measured(peaking_at(peak), batch_size=size), section(), GROUP)
    assert (decision.batch_size, decision.action, decision.regime) == want
    assert decision.law.peak == pytest.approx(peak * GROUP, rel=1e-4)


@pytest.mark.parametrize("size", [1, 40, 63])
@pytest.mark.parametrize("sigma", [0.0, 0.05, 1.0])
def test_without_a_peak_the_target_is_the_largest_size(size, sigma):
    decision = decide(measured(Usl(50, sigma, 0), batch_size=size), section(), GROUP)
    assert (decision.batch_size, decision.action, decision.law.peak) == (64, "increase", None)


@pytest.mark.parametrize(("size", "want"), [(40, "hold"), (31, "increase")])
def test_a_size_once_lowered_grows_by_the_full_margin_only(size, want):
    assert decide(measured(Usl(50, 0, 0), batch_size=size, throttled=True), section(), GROUP).action == want


def test_margins_are_those_of_the_section():
    keys = section(throttle_margin=1.0, increase_margin=0.0)
    assert decide(measured(peaking_at(20.5), batch_size=64), keys, GROUP).batch_size == 20
    assert decide(measured(peaking_at(20.5), batch_size=1), keys, GROUP).action == "hold"
    assert decide(measured(Usl(50, 0, 0), batch_size=1), keys, GROUP).action == "hold"


def test_average_by_hand():
    assert rules.average([3.0], 0.9) == 3.0
    assert rules.average([1.0, 2.0, 6.0], 0.5) == pytest.approx((1 * 0.25 + 2 * 0.5 + 6) / 1.75)
    assert rules.average([1.0, 2.0, 6.0], 0.0) == 6.0


def test_each_size_is_averaged_by_itself():
    law = Usl(50, 0.1, 1e-4)
    state = measured(law, sizes=(1, 8, 64))
    noisy = [(size, speed * factor) for size, speed in state.window for factor in (0.8, 1.2)]
    got = rules.fit_window(noisy, GROUP, ema_decay=0.999999)
    assert (got.scale, got.sigma, got.kappa) == pytest.approx((50, 0.1, 1e-4), rel=1e-3)


def test_the_window_forgets_the_oldest_of_the_size_it_has_most_of():
    state = State(8, steps=50, window=((1, 10.0), (64, 20.0)))
    for step in range(WINDOW + 30):
        state = observe(state, rules.Decision(8, "hold", "peak"), 100.0 + step)
    assert len(state.window) == WINDOW
    assert state.window[:2] == ((1, 10.0), (64, 20.0))
    assert state.window[2:] == tuple((8, 100.0 + step) for step in range(32, WINDOW + 30))


def test_a_pace_goes_through_all_stages():
    assert rules.throughput([(100, 2.0), (50, 3.0)]) == pytest.approx(1 / (2 / 100 + 3 / 50))
    assert rules.throughput([(100, 2.0), (0, 0.5)]) is None
    assert rules.throughput([(100, 2.0), (50, 0.0)]) is None


# ---------------------------------------------------------------- whatever is measured


SPEEDS = st.lists(st.one_of(st.none(), st.floats(1e-3, 1e9)), min_size=1, max_size=25)


@settings(max_examples=40, deadline=None)
@given(speeds=SPEEDS, least=st.integers(1, 9), extra=st.integers(0, 60), warmup=st.integers(1, 8))
def test_within_bounds_and_a_function_of_the_checkpoint(speeds, least, extra, warmup):
    keys = section(min_batch_size=least, max_batch_size=least + extra, warmup_steps=warmup)
    config = build({"training": {"group_size": GROUP, "batch_size": least}}).model_copy(update={"backpressure": keys})
    own, resumed = open_controller(config), open_controller(config)
    for speed in speeds:
        assert least <= own.batch_size <= least + extra
        # A run that is stopped after every step and resumed from what the checkpoint holds.
        assert resumed.batch_size == own.batch_size
        stages = [(0, 0.0)] if speed is None else [(1000, 1000 / speed)]
        figures = own.finish_step(stages)
        assert figures == resumed.finish_step(stages)
        assert set(figures) == set(BACKPRESSURE)
        assert all(not isinstance(v, float) or math.isfinite(v) for v in figures.values())
        resumed = open_controller(config, json.loads(json.dumps(resumed.state())))


def test_figures_say_how_the_size_came_about():
    state = measured(peaking_at(20.5), batch_size=64)
    own = Controller(section(), GROUP, state)
    assert own.batch_size == 17
    law = rules.fit_window(state.window, GROUP, 0.9)
    assert own.finish_step([(700, 2.0)]) == {
        "bp_action": "throttle",
        "bp_regime": "retrograde",
        "bp_p": 17 * GROUP,
        "bp_p_star": law.peak,
        "bp_scale": law.scale,
        "bp_sigma": law.sigma,
        "bp_kappa": law.kappa,
        "bp_throughput": 350.0,
        "bp_roofline": None,
    }


def test_without_backpressure_there_is_no_controller():
    assert open_controller(build({})) is None


def test_a_foreign_state_is_refused():
    with pytest.raises(RetrainError, match="backpressure state of the checkpoint has keys"):
        rules.restore({"batch_size": 3})


# ---------------------------------------------------------------- simulated machines


@pytest.mark.parametrize("batch_size", [1, 8, 40])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_linear_scaling_goes_to_the_largest_size(batch_size, noise):
    machine = Machine(((0, Usl(50, 0, 0)),), noise=noise)
    for seed in range(4):
        trace = simulate(POLICIES["adaptive"], machine, steps=40, seed=seed, batch_size=batch_size)
        assert set(trace.sizes_S[10:]) == {64}


def random_machine(seed):
    rng = generator(stream_key(seed, "a machine with a peak"))
    sigma, peak, noise = rng.uniform(0, 0.1), 2 ** rng.uniform(6, 10), rng.uniform(0.01, 0.05)
    return Machine(((0, Usl(50.0, sigma, (1 - sigma) / peak**2)),), noise=noise)


def test_with_a_peak_it_does_not_oscillate():
    """`benchmarks/backpressure.py` does this for 500 seeds."""
    for seed in range(30):
        trace = simulate(POLICIES["adaptive"], random_machine(seed), steps=80, seed=seed)
        assert trace.swing(50) <= 1, seed


@pytest.mark.parametrize("peak", [98, 313, 576])
def test_it_settles_near_the_best_size(peak):
    machine = Machine(((0, Usl(50, 0.01, 0.99 / peak**2)),), noise=0.02)
    for seed in range(3):
        trace = simulate(POLICIES["adaptive"], machine, steps=40, seed=seed, batch_size=64)
        assert trace.settled(within=0.1) <= 10
        assert trace.shares_S[-1] > 0.95


def test_simulated_policies_by_hand():
    machine = Machine(((0, Usl(50, 0.0, 1 / 100**2)),), noise=0.0)  # peak: 6.25 prompts
    sizes = {name: simulate(policy, machine, steps=9).sizes_S.tolist() for name, policy in POLICIES.items()}
    assert sizes["fixed"] == [8] * 9
    assert sizes["doubling"] == [1, 2, 4, 8, 16, 8, 8, 8, 8]  # 8 is still faster than 4
    assert sizes["aimd"] == [8, 9, 10, 11, 12, 13, 14, 15, 16]
    best = max(range(1, 65), key=lambda size: machine.law(0).throughput(16 * size))
    trace = simulate(POLICIES["fixed"], machine, steps=3, batch_size=best)
    assert (trace.regret, trace.settled()) == (0, 0)
    assert simulate(POLICIES["fixed"], machine, steps=3, batch_size=64).settled() == 3


def test_machines_change_and_drift():
    machine = Machine(((0, Usl(50, 0, 0)), (2, Usl(50, 0, 1e-2))), noise=0.0)
    shares = simulate(POLICIES["fixed"], machine, steps=4, batch_size=64).shares_S
    assert list(shares[:2]) == [1, 1]
    assert max(shares[2:]) < 0.3
    drifting = Machine(((0, Usl(50, 0, 0)),), noise=0.0, drift=2.0)
    stopped = [simulate(POLICIES["doubling"], drifting, steps=9, seed=seed).sizes_S[-1] for seed in range(4)]
    assert min(stopped) < 64  # without drift it never stops before


@pytest.mark.parametrize(
    ("sizes", "swing"),
    [([4, 4], 0), ([1, 4, 9, 9], 0), ([9, 4, 4, 5], 1), ([5, 9, 9, 2, 3, 2], 4), ([5, 9, 7, 5, 9], 4)],
)
def test_swing_by_hand(sizes, swing):
    assert Trace(np.array(sizes), np.ones(len(sizes))).swing(0) == swing


# ---------------------------------------------------------------- roofline


def test_intensity_by_hand():
    shape = ModelShape(hidden=10, layers=2, heads=4, kv_heads=2, head_dim=5, intermediate=30, vocab=100, tied=True)
    weights = 2 * (10 * 20 + 2 * 10 * 10 + 20 * 10 + 3 * 10 * 30) + 100 * 10
    # One query and one value product over 7 tokens for each of 4 heads of 5; two heads of keys and values are read.
    flops = 2 * weights + 2 * (2 * 4 * 5 * 7) * 2
    read = 4 * (weights / 3 + 2 * (2 * 5 * 7) * 2)
    assert intensity(shape, 3, context=7, item=4) == pytest.approx(flops / read)


def test_decoding_becomes_compute_bound_as_the_batch_grows():
    run = {
        "model": {"model": "builtin:tiny"},
        "backend": {"devices": "cpu"},
        "training": {"max_tokens": 8, "max_prompt_tokens": 4},
        "backpressure": {"enabled": True, "peak_gflops": 50.0, "peak_bw_gb_s": 10.0},
    }
    label = open_roofline(build(run))
    assert [label(p) for p in (1, 4, 64, 1024)] == ["memory_bound"] * 2 + ["compute_bound"] * 2
    for peaks in ({"peak_gflops": 0.0}, {"peak_bw_gb_s": 0.0}):
        assert open_roofline(build({**run, "backpressure": {**run["backpressure"], **peaks}})) is None
    assert open_roofline(build({**run, "model": {"model": "no/such-model"}})) is None
