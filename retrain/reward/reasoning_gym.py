"""The reward of Reasoning Gym's problems: each task's own scorer, which may give part of the credit.

The scorers parse what a model wrote, some of them with SymPy: they run in processes that are killed when the time is
up. The reference is the task's whole entry, as `retrain.data.gym` wrote it.
"""

from __future__ import annotations

import re

from retrain.boxed import last_box
from retrain.reward.pool import PoolScorer

WORKER = "retrain.reward.reasoning_gym_worker"
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def final_answer(response: str) -> str | None:
    """What stands, trimmed, between the last <answer> and </answer>; without them, in the last box; else None."""
    tagged = _ANSWER.findall(response)
    return tagged[-1].strip() if tagged else last_box(response)


class ReasoningGymScorer(PoolScorer):
    """What the entry's task says of the final answer, from 0 to 1; 0 where there is no answer."""

    def __init__(self, *, workers: int = 0, timeout_s: float = 10.0) -> None:
        super().__init__(WORKER, final_answer, workers=workers, timeout_s=timeout_s)
