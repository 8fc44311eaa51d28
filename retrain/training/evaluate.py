"""pass@k on held-out examples, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retrain.environment import Outcome
from retrain.streams import stream_key
from retrain.training.metrics import CORRECT
from retrain.training.rollouts import Rollouts
from retrain.training.stopwatch import Stopwatch

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A rate with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """pass_at: estimate by k. errors: completions whose reward could not be computed; they are left out."""

    examples: int
    samples: int
    errors: int
    mean_tokens: float
    pass_at: dict[int, Estimate]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k draws without replacement from n samples, c of them right, is right.

    Unbiased for pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1). ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples with {c} right: it takes 0 <= c <= n and 1 <= k <= n")
    return 1.0 if n - c < k else 1.0 - math.comb(n - c, k) / math.comb(n, k)


def rate_interval(values: Sequence[float]) -> Estimate:
    """Mean of per-problem values in [0, 1] with a 95% interval over problems.

    values: one or more. Wilson's score interval with the variance of the values in the place of p(1 - p): exactly
    Wilson's where every value is 0 or 1 (one sample a problem), narrower where several samples make a value less noisy.
    """
    n, mean = len(values), math.fsum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values) / n
    center = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(spread / n + Z95**2 / (4 * n**2))
    return Estimate(mean, max(0.0, center - half), min(1.0, center + half))


def answered(
    rollouts: Rollouts, places: Sequence[int], *, samples: int, temperature: float, seed: int, prompts_at_once: int
) -> Iterator[list[Outcome]]:
    """`samples` judged completions of each of the examples at `places`, in their order.

    The same seed asks with the same noise every time, example by example.
    """
    for start in range(0, len(places), prompts_at_once):
        part = places[start : start + prompts_at_once]
        ids = [rollouts.examples[place].id for place in part]
        keys = np.array([[stream_key(seed, "eval", key, g) for g in range(samples)] for key in ids], dtype=np.uint64)
        yield from rollouts.groups(part, keys, temperature=temperature, watch=Stopwatch())


def evaluate(
    rollouts: Rollouts,
    places: Sequence[int],
    *,
    samples: int,
    temperature: float,
    seed: int,
    prompts_at_once: int,
) -> Evaluation:
    """`samples` judged completions of each of one or more examples, those at `places`.

    pass@k for the powers of two up to `samples` and for `samples` itself.
    """
    counts: list[tuple[int, int]] = []
    errors = tokens = 0
    for outcomes in answered(
        rollouts, places, samples=samples, temperature=temperature, seed=seed, prompts_at_once=prompts_at_once
    ):
        values = [outcome.score.value for outcome in outcomes if outcome.score.value is not None]
        errors += samples - len(values)
        counts.append((len(values), sum(value > CORRECT for value in values)))
        tokens += sum(len(outcome.completion) for outcome in outcomes)
    pass_at = {}
    for k in sorted({2**i for i in range(samples.bit_length())} | {samples}):
        rates = [pass_at_k(n, c, k) for n, c in counts if n >= k]
        if rates:
            pass_at[k] = rate_interval(rates)
    return Evaluation(len(places), samples, errors, tokens / (len(places) * samples), pass_at)
