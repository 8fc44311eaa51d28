"""The statistics of campaigns against SciPy, enumeration and simulated campaigns."""

from __future__ import annotations

from itertools import chain, combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from retrain.campaign.results import CANNOT_TELL, compare, verdict
from retrain.campaign.statistics import compare as compare_pairs
from retrain.campaign.statistics import estimate, holm, seeds_needed, sign_flip

SIMULATED = 1000
RATES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_interval_is_scipys(values: list[float]) -> None:
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values))
    if not found.sd:
        assert (found.low, found.high) == (None, None)
        return
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-9), pytest.approx(high, rel=1e-9))


@settings(deadline=None)
@given(RATES)
def test_p_values_are_scipys(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = np.array(pairs).T
    found = compare_pairs(ours, theirs)
    assert found.difference.mean == pytest.approx(np.mean(ours - theirs), abs=1e-12)
    if found.difference.sd:
        expected = stats.ttest_rel(ours, theirs)
        assert found.p_t == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
        interval = expected.confidence_interval(0.95)
        assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    else:
        assert found.p_t is None


@pytest.mark.parametrize("n", [2, 3, 5, 8, 11])
def test_sign_flips_are_scipys(n: int) -> None:
    rng = np.random.default_rng(n)
    for shift in (0.0, 0.5, 3.0):
        x, y = rng.normal(shift, 1, n), rng.normal(0, 1, n)
        expected = stats.permutation_test(
            (x, y), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", n_resamples=np.inf
        )
        # SciPy doubles the smaller tail, which for this symmetric distribution is the share of both.
        assert sign_flip(x - y) == pytest.approx(min(1.0, expected.pvalue), rel=1e-12)


def test_sign_flips_with_ties_by_enumeration() -> None:
    differences = [0.1, 0.2, 0.3, 0.0, -0.1]
    hits = sum(abs(np.dot(signs, differences)) >= 0.5 - 1e-9 for signs in product((-1, 1), repeat=5))
    assert sign_flip(differences) == hits / 32


def test_many_seeds_are_drawn_not_enumerated() -> None:
    d = np.random.default_rng(1).normal(0.35, 1, 30)
    exact_in_the_limit = 2 * stats.norm.sf(abs(d.sum()) / np.sqrt((d**2).sum()))
    assert sign_flip(d) == pytest.approx(exact_in_the_limit, rel=0.1)
    assert sign_flip(d) == sign_flip(d), "the same data give the same number"
    assert sign_flip(np.ones(30)) == pytest.approx(1 / 2**20, rel=1e-5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """Holm's procedure rejects i exactly where Bonferroni rejects every intersection that contains i."""
    indices = range(len(p_values))
    subsets = list(chain.from_iterable(combinations(indices, size) for size in range(1, len(p_values) + 1)))
    expected = [
        max(min(1.0, len(subset) * min(p_values[j] for j in subset)) for subset in subsets if i in subset)
        for i in indices
    ]
    assert holm(p_values) == pytest.approx(expected)


def test_holm_counts_a_test_that_could_not_be_made() -> None:
    assert holm([0.01, None, 0.04]) == [0.03, None, 0.08]


def test_seeds_needed() -> None:
    """n = 34 for d = 0.5 and n = 199 for d = 0.2: G*Power's paired two-sided t test, alpha .05, power .8."""
    assert seeds_needed(0.02, 0.01) == 34
    assert seeds_needed(0.05, 0.01) == 199
    assert seeds_needed(0.0001, 0.01) == 2
    assert seeds_needed(None, 0.01) is None
    assert seeds_needed(0.0, 0.01) is None
    assert seeds_needed(1e6, 0.01) is None


@pytest.mark.parametrize(("sd", "alpha"), [(0.004, 0.05), (0.01, 0.05), (0.03, 0.0125)])
def test_seeds_needed_is_the_smallest_with_the_power(sd: float, alpha: float) -> None:
    n = seeds_needed(sd, 0.01, alpha)
    assert n is not None

    def power(n: int) -> float:
        return float(stats.nct.sf(stats.t.isf(alpha / 2, n - 1), n - 1, 0.01 / sd * np.sqrt(n)))

    assert power(n) >= 0.8
    assert n == 2 or power(n - 1) < 0.8


def test_what_does_not_exist_is_none() -> None:
    assert estimate([]).mean is None
    one = estimate([0.5])
    assert (one.mean, one.sd, one.low) == (0.5, None, None)
    same = compare_pairs([0.3, 0.4, 0.5], [0.1, 0.2, 0.3])
    assert (same.difference.sd, same.difference.low, same.p_t, same.p_flip) == (0.0, None, None, 0.25)
    assert verdict(0.2, None) == CANNOT_TELL
    assert verdict(0.2, 0.051) == CANNOT_TELL
    assert (verdict(0.2, 0.05), verdict(-0.2, 0.05)) == ("higher", "lower")
    none = compare({"a": {}, "b": {1: 0.5}})
    assert none["comparisons"]["b"]["n"] == 0
    assert none["comparisons"]["b"]["p_flip"] is None


def test_only_common_seeds_are_paired() -> None:
    found = compare({"a": {1: 0.1, 2: 0.2, 3: 0.3}, "b": {3: 0.5, 1: 0.2, 4: 0.9}})
    assert found["comparisons"]["b"]["seeds"] == [1, 3]
    assert found["comparisons"]["b"]["mean"] == pytest.approx(0.15)
    assert found["conditions"]["b"]["seeds"] == [1, 3, 4]


def simulate(rng: np.random.Generator, seeds: int, effects: list[float], kind: str) -> dict[str, dict[int, float]]:
    """Rates of a campaign: what a seed makes easy or hard is shared by all conditions, the rest is noise."""
    easy = rng.normal(0, 0.05, seeds)
    rates = {}
    for i, effect in enumerate([0.0, *effects]):
        if kind == "normal":
            values = 0.5 + easy + effect + rng.normal(0, 0.03, seeds)
        else:  # counts of correct completions, few enough that ties are common
            values = rng.binomial(40, np.clip(0.5 + easy + effect, 0, 1)) / 40
        rates[f"c{i}"] = {seed: float(value) for seed, value in enumerate(values)}
    return rates


def within_binomial_error(hits: int, trials: int, rate: float) -> tuple[float, float]:
    """99.8% of binomial counts lie here."""
    low, high = stats.binom.interval(0.998, trials, rate)
    return float(low), float(high)


@pytest.mark.parametrize("kind", ["normal", "counts"])
@pytest.mark.parametrize("seeds", [3, 8])
def test_false_positives(seeds: int, kind: str) -> None:
    """Four conditions that differ in nothing from the first: at most 5% of campaigns claim any difference."""
    rng = np.random.default_rng(seeds)
    campaigns = [compare(simulate(rng, seeds, [0.0] * 4, kind)) for _ in range(SIMULATED)]
    wrong = sum(any(one["verdict"] != CANNOT_TELL for one in c["comparisons"].values()) for c in campaigns)
    assert wrong <= within_binomial_error(wrong, SIMULATED, 0.05)[1]
    by_flips = sum(any(one["p_flip_holm"] <= 0.05 for one in c["comparisons"].values()) for c in campaigns)
    assert by_flips <= within_binomial_error(by_flips, SIMULATED, 0.05)[1]


@pytest.mark.parametrize("seeds", [3, 8])
def test_coverage(seeds: int) -> None:
    """With true differences, 95% of the intervals hold them; and the larger one is found more often."""
    rng = np.random.default_rng(100 + seeds)
    effects = [0.02, 0.12]
    campaigns = [compare(simulate(rng, seeds, effects, "normal")) for _ in range(SIMULATED)]
    found = []
    for i, effect in enumerate(effects, start=1):
        comparisons = [campaign["comparisons"][f"c{i}"] for campaign in campaigns]
        held = sum(one["low"] <= effect <= one["high"] for one in comparisons)
        low, high = within_binomial_error(held, SIMULATED, 0.95)
        assert low <= held <= high
        found.append(sum(one["verdict"] == "higher" for one in comparisons))
    assert found[0] < found[1]
    assert seeds == 3 or found[1] > 0.95 * SIMULATED
    covered = sum(c["conditions"]["c0"]["low"] <= 0.5 <= c["conditions"]["c0"]["high"] for c in campaigns)
    low, high = within_binomial_error(covered, SIMULATED, 0.95)
    assert low <= covered <= high


def test_power_is_what_seeds_needed_says() -> None:
    rng = np.random.default_rng(5)
    n = seeds_needed(0.015, 0.01)
    assert n is not None
    d = rng.normal(0.01, 0.015, (SIMULATED, n))
    seen = sum(stats.ttest_1samp(row, 0).pvalue <= 0.05 for row in d)
    low, _ = within_binomial_error(seen, SIMULATED, 0.8)
    assert low <= seen <= 0.87 * SIMULATED
