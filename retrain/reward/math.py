"""The `math` reward: the boxed answer is mathematically equivalent to the reference, judged by math-verify."""

from __future__ import annotations

from retrain.boxed import last_box
from retrain.reward.pool import PoolScorer

WORKER = "retrain.reward.math_worker"


class MathScorer(PoolScorer):
    """1.0 where math-verify finds the content of the last box equal to the reference; a reference it cannot read and a
    comparison that takes longer than `timeout_s` are errors."""

    def __init__(self, *, workers: int = 0, timeout_s: float = 10.0) -> None:
        super().__init__(WORKER, last_box, workers=workers, timeout_s=timeout_s)
