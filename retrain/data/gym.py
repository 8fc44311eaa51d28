"""Problems of Reasoning Gym (arXiv 2505.24760): `reasoning_gym:TASK[,TASK...]`, each with the scorer of its task."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

from retrain.config.fields import REASONING_GYM
from retrain.config.suggest import did_you_mean
from retrain.plugin import child_environment
from retrain.types import ConfigError, Example

PROBLEMS = 1000  # of each task, always the same ones
WORKER = "retrain.data.gym_worker"
MISSING = 'Reasoning Gym is not installed: pip install "retrain[reasoning-gym]"'
ANSWER_INSTRUCTION = "\n\nGive your final answer between <answer> and </answer>."


def load(source: str, *, say: Callable[[str], None], count: int = PROBLEMS) -> list[Example]:
    """`count` problems of each task, taken from the tasks in turn; the reference is the task's whole entry.

    Raises ConfigError where the library is missing, a task unknown or named twice, or a task fails.
    """
    tasks = [task.strip() for task in source.removeprefix(REASONING_GYM).split(",")]
    if find_spec("reasoning_gym") is None:
        raise ConfigError(f'data.source = "{source}": {MISSING}')
    if len(set(tasks)) < len(tasks):
        raise ConfigError(f'data.source = "{source}": names a task twice')
    say(f"making {count} problems of {', '.join(tasks)}")
    # Some tasks iterate over sets: only a process with a fixed hash seed makes the same problems in every run.
    made = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-m", WORKER, str(count), *tasks],
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if made.returncode:
        reason = (made.stderr.strip().splitlines() or [f"exit status {made.returncode}"])[-1]
        raise ConfigError(f'data.source = "{source}": Reasoning Gym failed: {reason}')
    answer = json.loads(made.stdout)
    if "unknown" in answer:
        unknown, known = answer["unknown"], answer["known"]
        hint = did_you_mean(unknown, known) or f". It has {', '.join(known)}"
        raise ConfigError(f'data.source = "{source}": Reasoning Gym has no task "{unknown}"{hint}')
    return [Example(question + ANSWER_INSTRUCTION, entry) for question, entry in answer["problems"]]
