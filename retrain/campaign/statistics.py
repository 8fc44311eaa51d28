"""What the seeds of a campaign say: intervals, paired differences, p-values, and how many seeds it would take.

Everything is two-sided. A figure that does not exist (one seed, seeds that do not vary) is None, never a number that
looks like one. The distribution functions are SciPy's; torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import nctdtr, stdtr, stdtrit

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
POWER = 0.8
# Up to here every pattern of signs is tried (a million); beyond, that many are drawn.
EXACT_SEEDS = 20
DRAWN_FLIPS = 2**EXACT_SEEDS
MOST_SEEDS = 10_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% t interval. sd: of one seed, with n - 1. None where it does not exist."""

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """Paired differences to the baseline. p_t: paired t test; p_flip: sign-flip permutation test."""

    difference: Estimate
    p_t: float | None
    p_flip: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of `values` (one a seed) and mean -+ t(0.975, n - 1) * sd / sqrt(n).

    No interval for fewer than two values, nor for values that are all equal: a spread of 0 over a few seeds is not
    known to be 0.
    """
    n = len(values)
    if n == 0:
        return Estimate(0, None, None, None, None)
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(1, mean, None, None, None)
    sd = _sd(values)
    if sd == 0:
        return Estimate(n, mean, 0.0, None, None)
    half = float(stdtrit(n - 1, 1 - ALPHA / 2)) * sd / n**0.5
    return Estimate(n, mean, sd, mean - half, mean + half)


def compare(values: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """`values` against `baseline`, both of the same seeds in the same order."""
    differences = np.subtract(values, baseline, dtype=np.float64)
    difference = estimate(differences.tolist())
    p_flip = sign_flip(differences) if difference.n else None
    if difference.low is None or not difference.sd or difference.mean is None:
        return Comparison(difference, None, p_flip)
    t = difference.mean / (difference.sd / difference.n**0.5)
    return Comparison(difference, float(2 * stdtr(difference.n - 1, -abs(t))), p_flip)


def sign_flip(differences: Sequence[float] | np.ndarray, seed: int = 0) -> float:
    """p-value of Fisher's randomisation test: under no difference each pair could as well stand the other way round.

    The share of sign patterns whose |sum| is at least the observed one: of all 2^n up to 20 pairs, so that it is never
    below 2 / 2^n; else (b + 1) / (m + 1) with b of m = 2^20 drawn patterns (Phipson and Smyth 2010).
    """
    d = np.asarray(differences, dtype=np.float64)
    observed = abs(d.sum())
    # Sums of the same numbers in another order differ by rounding.
    least = observed - 1e-9 * np.abs(d).sum()
    if len(d) <= EXACT_SEEDS:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= least))
    rng = np.random.default_rng(seed)
    blocks = [rng.choice((-1.0, 1.0), size=(DRAWN_FLIPS // 64, len(d))) @ d for _ in range(64)]
    hits = sum(int(np.count_nonzero(np.abs(block) >= least)) for block in blocks)
    return (hits + 1) / (DRAWN_FLIPS + 1)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values (Holm 1979): rejecting those <= alpha keeps the chance of any false one at alpha.

    None is a test that could not be made; it still counts as one, since it might have been.
    """
    m = len(p_values)
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * m
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (m - rank) * p))
        adjusted[i] = highest
    return adjusted


def seeds_needed(sd: float | None, delta: float, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Smallest number of pairs with which the paired t test sees a true difference of `delta` with that power.

    sd: of the differences; None or 0 (not known to vary) gives None, as does a number above ten million. Exact, by the
    noncentral t distribution; the far tail counts as a miss.
    """
    if not sd:
        return None
    low, high = 1, 2
    while _power(high, delta / sd, alpha) < power:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(middle, delta / sd, alpha) >= power else (middle, high)
    return high


def _power(n: int, effect: float, alpha: float) -> float:
    """Chance that the paired t test of n pairs rejects on the right side; effect: true difference / sd."""
    critical = stdtrit(n - 1, 1 - alpha / 2)
    return 1 - float(nctdtr(n - 1, effect * n**0.5, critical))


def _sd(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 where the values differ by no more than rounding."""
    x = np.asarray(values, dtype=np.float64)
    sd = float(np.std(x, ddof=1))
    return 0.0 if sd <= 1e-12 * float(np.max(np.abs(x))) else sd
