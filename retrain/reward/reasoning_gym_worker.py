"""The process that scores answers to Reasoning Gym's problems: `python -m retrain.reward.reasoning_gym_worker S`.

A reference is an entry of a task as a Python literal; an answer of null scores 0.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from reasoning_gym.factory import get_score_answer_fn

from retrain.reward.worker import serve


@cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    return get_score_answer_fn(task)  # pyright: ignore[reportReturnType] - the library declares it without arguments


@lru_cache(maxsize=256)
def _entry(reference: str) -> dict[str, Any]:
    return ast.literal_eval(reference)


def judge(reference: str, answer: str | None) -> dict:
    """The task's verdict on one answer."""
    if answer is None:
        return {"value": 0.0}
    entry = _entry(reference)
    value = float(_scorer(entry["metadata"]["source_dataset"])(answer, entry))
    if not math.isfinite(value):
        return {"error": f"the task's scorer gave {value}, which is no score"}
    return {"value": value}


if __name__ == "__main__":
    serve(judge, library="reasoning-gym")
