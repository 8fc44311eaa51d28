"""Environments: who writes the prompts, answers the model's turns, and judges the whole (`[environment]`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from retrain.environment.waves import Sample, Turn
from retrain.types import Completion, Example, Score

if TYPE_CHECKING:
    from retrain.config import Config

__all__ = ["Environment", "Outcome", "Problem", "Sample", "Start", "Turn", "module_of", "open_environment"]


@dataclass(frozen=True)
class Problem:
    """A row of an environment's dataset. example: its opening as text, and its answer. prompt_T: int64 token ids."""

    example: Example
    prompt_T: np.ndarray
    row: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """An episode to be played. stream: the random stream that its turns' streams are derived from."""

    problem: Problem
    stream: int


@dataclass(frozen=True)
class Outcome:
    """completion: everything after the prompt, the environment's tokens included and marked."""

    completion: Completion
    score: Score


class Environment(Protocol):
    """train: what may be trained on. eval: held out; may be empty."""

    train: Sequence[Problem]
    eval: Sequence[Problem]

    def play(self, groups: Sequence[Sequence[Start]], sample: Sample, *, max_tokens: int) -> list[list[Outcome]]:
        """One outcome for each start; the episodes of a group are of one problem.

        sample: completes a batch of turns; called from this thread. max_tokens: most tokens that an episode samples. An
        episode that fails has a score with the reason, and what had been sampled by then.
        """
        ...

    def close(self) -> None: ...


def module_of(name: str) -> str:
    """The module of an environment's id: "owner/some-name@1.0" is some_name."""
    return name.rpartition("/")[2].partition("@")[0].replace("-", "_")


def open_environment(config: Config, tokenizer: Any, *, eos_ids: Sequence[int], context: int) -> Environment:
    """The environment of `[environment]`. context: most tokens that the model takes.

    Raises ConfigError where it is not installed, cannot be loaded, or has nothing to train on.
    """
    from retrain.environment.chat import Chat
    from retrain.environment.verifiers import VerifiersEnvironment

    return VerifiersEnvironment(config.environment, Chat(tokenizer, eos_ids), context=context)
