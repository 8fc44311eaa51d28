"""The process that makes Reasoning Gym's problems: `python -m retrain.data.gym_worker COUNT TASK...`, hash seed fixed.

It prints {"problems": [[question, entry], ...]}, the tasks in turn, or {"unknown": task, "known": [...]}. An entry is
a Python literal, because JSON would make lists of the tuples that some scorers compare with.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from reasoning_gym.factory import DATASETS, create_dataset

SEED = 0
NEEDS_CONFIGURATION = ("composite",)


def problems(tasks: list[str], count: int) -> Iterator[tuple[str, str]]:
    """(question, entry) of each task's problem number 0, then of each task's problem number 1, and so on."""
    sources = [(task, create_dataset(task, seed=SEED, size=count)) for task in tasks]
    for index in range(count):
        for task, source in sources:
            # Not every task keeps to its own generator.
            random.seed(f"{task}/{index}")
            np.random.seed(index)
            entry = _plain(source[index])
            entry["metadata"]["source_dataset"] = task
            yield entry["question"], repr(entry)


def _plain(value: Any) -> Any:
    """The same value without NumPy's types, so that its repr is a literal."""
    match value:
        case dict():
            return {_plain(key): _plain(inner) for key, inner in value.items()}
        case list() | tuple() | set():
            return type(value)(map(_plain, value))
        case np.ndarray() | np.generic() if not isinstance(value, str):
            return _plain(value.tolist())
        case str():
            return str(value)
    return value


def main() -> None:
    count, tasks = int(sys.argv[1]), sys.argv[2:]
    known = sorted(set(DATASETS) - set(NEEDS_CONFIGURATION))
    unknown = next((task for task in tasks if task not in known), None)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)  # whatever a library prints must not end up in the answer
        if unknown is not None:
            json.dump({"unknown": unknown, "known": known}, answer)
        else:
            json.dump({"problems": list(problems(tasks, count))}, answer)


if __name__ == "__main__":
    main()
