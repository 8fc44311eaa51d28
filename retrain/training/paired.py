"""Two adapters on the same held-out examples: the difference in reward, example by example, with an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scipy import stats

from retrain.environment import Outcome
from retrain.training.evaluate import Estimate, rate_interval
from retrain.training.heldout import answer_with_adapter
from retrain.types import RetrainError

if TYPE_CHECKING:
    from retrain.config import Config


@dataclass(frozen=True)
class Comparison:
    """before, after: mean rewards over the examples that both could be judged on. difference: after - before, with a
    95% interval over examples. errors: completions whose reward could not be computed; they are left out."""

    examples: int
    samples: int
    errors: int
    before: float
    after: float
    difference: Estimate


def compare_adapters(config: Config, before: Path, after: Path, *, say: Callable[[str], None]) -> Comparison:
    """`[eval]` of `config` with each adapter: the same examples, sampled with the same noise.

    Raises ConfigError where nothing is held out, RetrainError where an adapter does not fit the model or no example
    could be judged with both.
    """
    answers = [answer_with_adapter(config, adapter, say=say) for adapter in (before, after)]
    means = [[mean_reward(outcomes) for outcomes in groups] for groups in answers]
    pairs = [(a, b) for a, b in zip(*means, strict=True) if a is not None and b is not None]
    if not pairs:
        raise RetrainError("no held-out example could be scored with both adapters: there is nothing to compare")
    return Comparison(
        examples=len(pairs),
        samples=config.eval.samples,
        errors=sum(outcome.score.value is None for groups in answers for group in groups for outcome in group),
        before=math.fsum(a for a, _ in pairs) / len(pairs),
        after=math.fsum(b for _, b in pairs) / len(pairs),
        difference=paired_difference(pairs),
    )


def mean_reward(outcomes: Sequence[Outcome]) -> float | None:
    values = [outcome.score.value for outcome in outcomes if outcome.score.value is not None]
    return math.fsum(values) / len(values) if values else None


def paired_difference(pairs: Sequence[tuple[float, float]]) -> Estimate:
    """Mean of b - a over one or more pairs, with a 95% interval.

    Rewards within [0, 1]: Wilson's score interval of (1 + b - a) / 2, which does not claim certainty where all pairs
    agree. Others: Student's t. Raises RetrainError where that has one pair only.
    """
    differences = [b - a for a, b in pairs]
    if all(0 <= value <= 1 for pair in pairs for value in pair):
        rate = rate_interval([(1 + difference) / 2 for difference in differences])
        return Estimate(math.fsum(differences) / len(pairs), 2 * rate.low - 1, 2 * rate.high - 1)
    mean = math.fsum(differences) / len(pairs)
    if len(pairs) < 2:
        raise RetrainError("rewards outside [0, 1] have no interval with one held-out example; raise eval.examples")
    half = stats.sem(differences) * stats.t.ppf(0.975, len(pairs) - 1)
    return Estimate(mean, float(mean - half), float(mean + half))
