"""pass@k and its interval against enumeration and SciPy, and the evaluation around them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from retrain.streams import stream_key
from retrain.training.evaluate import evaluate, pass_at_k, rate_interval
from retrain.training.rollouts import Answers
from retrain.types import Completion, Example, Score


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations(range(n), k))
            share = sum(any(sample < c for sample in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@given(n=st.integers(1, 3000), data=st.data())
def test_pass_at_k_is_monotone_and_bounded_at_any_size(n, data):
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    value = pass_at_k(n, c, k)
    assert 0 <= value <= 1
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    if k > 1:
        assert value >= pass_at_k(n, c, k - 1)
    if c:
        assert value >= pass_at_k(n, c - 1, k)
    assert (value == 0) == (c == 0)


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 2), (4, 5, 1), (4, 2, 0), (0, 0, 1), (4, -1, 1)])
def test_pass_at_k_of_nonsense(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize("n", [1, 2, 5, 30, 64, 1000])
def test_interval_is_wilsons_for_zeros_and_ones(n):
    for right in {0, 1, n // 3, n // 2, n - 1, n}:
        estimate = rate_interval([1.0] * right + [0.0] * (n - right))
        reference = binomtest(right, n).proportion_ci(method="wilson")
        assert estimate.value == pytest.approx(right / n)
        assert estimate.low == pytest.approx(reference.low, abs=1e-12)
        assert estimate.high == pytest.approx(reference.high, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_interval_holds_the_mean_and_is_no_wider_than_wilsons(values):
    estimate = rate_interval(values)
    assert 0 <= estimate.low <= estimate.value + 1e-12
    assert estimate.value - 1e-12 <= estimate.high <= 1
    n, mean = len(values), float(np.mean(values))
    z = 1.959963984540054
    widest = 2 * z / (1 + z**2 / n) * (mean * (1 - mean) / n + z**2 / (4 * n**2)) ** 0.5
    assert estimate.high - estimate.low <= widest + 1e-9


def test_interval_covers_the_truth_at_its_rate():
    """Problems whose rates spread as Beta(2, 3), 8 samples each: 95% of the intervals hold the mean, 0.4."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        values = rng.binomial(8, rng.beta(2, 3, size=40)) / 8
        estimate = rate_interval(list(values))
        covered += estimate.low <= 0.4 <= estimate.high
    assert abs(covered / 2000 - 0.95) < 0.02


# ---------------------------------------------------------------- evaluate


class FakeEngine:
    """Answers with the digits of each stream's key, so that the noise it was given shows in the text."""

    policy_version = 0

    def __init__(self):
        self.calls = []

    def generate(self, prompts, streams_PG, *, max_tokens, temperature):
        assert streams_PG.dtype == np.uint64
        assert streams_PG.shape[0] == len(prompts)
        self.calls.append((len(prompts), max_tokens, temperature))
        return [
            tuple(
                Completion(np.arange(1 + g), np.zeros(1 + g, np.float32), "stop", 0, f"{prompt[0]}:{g}:{key}")
                for g, key in enumerate(row)
            )
            for prompt, row in zip(prompts, streams_PG, strict=True)
        ]

    def publish(self, version):
        raise AssertionError

    def close(self):
        raise AssertionError


class FakeScorer:
    """verdicts: (prompt, sample) -> reward or None."""

    def __init__(self, verdicts):
        self.verdicts, self.calls, self.texts = verdicts, 0, []

    def score(self, responses, references, prompts):
        self.calls += 1
        self.texts += responses
        found = []
        for response, reference in zip(responses, references, strict=True):
            prompt, sample, _ = response.split(":")
            assert reference == f"ref {prompt}", "each response is compared with its own reference"
            value = self.verdicts[int(prompt)][int(sample)]
            found.append(Score(value, None if value is not None else "timed out"))
        return found

    def close(self):
        raise AssertionError


def run(verdicts, *, prompts_at_once=2, seed=5):
    engine, scorer = FakeEngine(), FakeScorer(verdicts)
    examples = [Example(f"prompt {i}", f"ref {i}") for i in range(len(verdicts))]
    rollouts = Answers(examples, [np.array([i, 9]) for i in range(len(verdicts))], engine, scorer, 33)
    result = evaluate(
        rollouts, range(len(verdicts)),
        samples=len(verdicts[0]), temperature=0.7, seed=seed, prompts_at_once=prompts_at_once,
    )  # fmt: skip
    return result, engine, scorer


VERDICTS = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, None], [None, None, None], [1.0, 1.0, 0.5]]


def test_errors_are_left_out_and_counted():
    result, engine, scorer = run(VERDICTS)
    assert (result.examples, result.samples, result.errors) == (5, 3, 4)
    assert result.mean_tokens == 2.0
    assert engine.calls == [(2, 33, 0.7), (2, 33, 0.7), (1, 33, 0.7)]
    assert scorer.calls == 3, "a part is scored at once, for the sake of parallel scorers"
    # By hand: of 3 samples right 1, 0, 2 of 2, none left, 2 (a reward of one half is not right).
    assert result.pass_at.keys() == {1, 2, 3}
    assert result.pass_at[1].value == pytest.approx((1 / 3 + 0 + 1 + 2 / 3) / 4)
    assert result.pass_at[2].value == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)
    assert result.pass_at[3].value == pytest.approx((1 + 0 + 1) / 3), "only where three samples could be judged"


def test_one_sample_gives_wilsons_interval():
    result, _, _ = run([[1.0]] * 7 + [[0.0]] * 3, prompts_at_once=4)
    reference = binomtest(7, 10).proportion_ci(method="wilson")
    assert result.pass_at.keys() == {1}
    assert result.pass_at[1].low == pytest.approx(reference.low)
    assert result.pass_at[1].high == pytest.approx(reference.high)


def test_nothing_could_be_judged():
    result, _, _ = run([[None, None], [None, None]])
    assert result.pass_at == {}
    assert result.errors == 4


@pytest.mark.parametrize(("samples", "ks"), [(1, {1}), (2, {1, 2}), (5, {1, 2, 4, 5}), (8, {1, 2, 4, 8}), (200, None)])
def test_which_k(samples, ks):
    result, _, _ = run([[1.0] * samples])
    assert result.pass_at.keys() == (ks or {1, 2, 4, 8, 16, 32, 64, 128, 200})


def test_noise_depends_on_the_example_and_the_seed_alone():
    whole, parts, other = (
        run(VERDICTS, **keys)[2].texts for keys in ({"prompts_at_once": 5}, {"prompts_at_once": 1}, {"seed": 6})
    )
    assert whole == parts
    assert not set(whole) & set(other)
    assert whole[0] == f"0:0:{stream_key(5, 'eval', Example('prompt 0', 'ref 0').id, 0)}"
    assert len({text.split(":")[2] for text in whole}) == 15
