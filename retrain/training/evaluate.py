"""pass@k on held-out examples, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retrain.inference import Engine
from retrain.reward import Scorer
from retrain.streams import stream_key
from retrain.training.metrics import CORRECT
from retrain.types import Example

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
    """Chance that one of k draws without replacement from n samples, c of them right, is right.

    Unbiased for pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    return 1.0 if n - c < k else 1.0 - math.comb(n - c, k) / math.comb(n, k)


def rate_interval(values: Sequence[float]) -> Estimate:
    """Mean of per-problem values in [0, 1] with a 95% interval over problems.

    Wilson's score interval, with the variance of the values in the place of p(1 - p): exact Wilson where every value is
    0 or 1 (one sample a problem), narrower where several samples make a problem's value less noisy.
    """
    n, mean = len(values), sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / n
    center = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(spread / n + Z95**2 / (4 * n**2))
    return Estimate(mean, max(0.0, center - half), min(1.0, center + half))


def evaluate(
    engine: Engine,
    scorer: Scorer,
    examples: Sequence[Example],
    prompt_tokens: Sequence[np.ndarray],
    *,
    samples: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    prompts_at_once: int,
) -> Evaluation:
    """Sample `samples` completions of each example and score them. The same seed asks with the same noise every time."""
    counts: list[tuple[int, int]] = []
    errors = tokens = 0
    for start in range(0, len(examples), prompts_at_once):
        part = examples[start : start + prompts_at_once]
        streams_PG = np.array(
            [[stream_key(seed, "eval", example.id, g) for g in range(samples)] for example in part], dtype=np.uint64
        )
        groups = engine.generate(
            prompt_tokens[start : start + prompts_at_once], streams_PG, max_tokens=max_tokens, temperature=temperature
        )
        for example, completions in zip(part, groups, strict=True):
            scores = scorer.score([c.text for c in completions], [example.reference] * samples)
            values = [score.value for score in scores if score.value is not None]
            errors += samples - len(values)
            tokens += sum(map(len, completions))
            if values:
                counts.append((len(values), sum(value > CORRECT for value in values)))
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= samples]
    pass_at = {}
    for k in ks:
        values = [pass_at_k(n, c, k) for n, c in counts if n >= k]
        if values:
            pass_at[k] = rate_interval(values)
    return Evaluation(len(examples), samples, errors, tokens / (len(examples) * samples), pass_at)
