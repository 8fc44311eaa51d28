"""Prompts to scored groups: the sampling half of a step. It changes no state, so a signal may cut it short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from retrain import data
from retrain.algorithm.episode import is_uniform
from retrain.environment import Outcome
from retrain.streams import stream_key
from retrain.training.batching import shaped_rewards
from retrain.training.rollouts import Rollouts
from retrain.training.stopwatch import Stopwatch
from retrain.types import Completion, Group, RetrainError

if TYPE_CHECKING:
    from retrain.config import AlgorithmConfig, DataConfig, TrainingConfig

REASONS_SHOWN = 3


@dataclass
class Collected:
    """Groups of one step; `groups` are trained on, `uniform` only counted (dynamic sampling set them aside).

    figures: what their rewards took, as `Scorer.figures` names it.
    """

    groups: list[Group]
    uniform: list[Group]
    prompts_used: int
    figures: dict[str, float | None] = field(default_factory=dict)

    @property
    def sampled(self) -> list[Group]:
        return self.groups + self.uniform


@dataclass(frozen=True)
class Collector:
    rollouts: Rollouts
    seed: int
    training: TrainingConfig
    algorithm: AlgorithmConfig
    data: DataConfig
    max_error_rate: float = 1.0

    def collect(self, step: int, first_prompt: int, version: int, watch: Stopwatch, batch_size: int) -> Collected:
        """Sample and score `batch_size` groups, starting at the run's prompt number `first_prompt`.

        With dynamic sampling (DAPO, arXiv 2503.14476), uniform groups are replaced by those of further prompts.
        Raises RewardsFailed where more than `max_error_rate` of the completions have no reward.
        """
        wanted, rounds = batch_size, 1
        if self.algorithm.dynamic_sampling:
            rounds += self.algorithm.max_resample_rounds
        got = Collected([], [], first_prompt)
        for _ in range(rounds):
            for group in self._round(step, got, wanted - len(got.groups), version, watch):
                keep = not self.algorithm.dynamic_sampling or self._is_informative(group)
                (got.groups if keep else got.uniform).append(group)
            if len(got.groups) >= wanted:
                break
        check_error_rate(got.sampled, self.max_error_rate)
        got.figures = self.rollouts.figures()
        return got

    def _round(self, step: int, got: Collected, count: int, version: int, watch: Stopwatch) -> list[Group]:
        ordinals = range(got.prompts_used, got.prompts_used + count)
        got.prompts_used += count
        places = [
            data.position(ordinal, len(self.rollouts.examples), seed=self.seed, shuffle=self.data.shuffle)
            for ordinal in ordinals
        ]
        size = self.training.group_size
        streams_PG = np.array(
            [[stream_key(self.seed, "sample", step, ordinal, g) for g in range(size)] for ordinal in ordinals],
            dtype=np.uint64,
        )
        answers = self.rollouts.groups(places, streams_PG, temperature=self.training.temperature, watch=watch)
        return [
            self._group(ordinal, place, outcomes, version)
            for ordinal, place, outcomes in zip(ordinals, places, answers, strict=True)
        ]

    def _group(self, ordinal: int, place: int, outcomes: Sequence[Outcome], version: int) -> Group:
        check_version([outcome.completion for outcome in outcomes], version)
        scores = [outcome.score for outcome in outcomes]
        return Group(
            ordinal,
            self.rollouts.examples[place],
            self.rollouts.prompt_tokens[place],
            tuple(outcome.completion for outcome in outcomes),
            rewards_G=tuple(score.value for score in scores),
            errors_G=tuple(score.error for score in scores),
            parts_G=tuple(score.parts for score in scores),
        )

    def _is_informative(self, group: Group) -> bool:
        buffer, limit = self.algorithm.overlong_buffer, self.training.max_tokens
        return not is_uniform(shaped_rewards(group, overlong_buffer=buffer, max_tokens=limit))


class RewardsFailed(RetrainError):
    """Too many rewards of a step could not be computed."""


def check_error_rate(groups: Sequence[Group], most: float) -> None:
    """Raise RewardsFailed, with the commonest reasons, where errors are more than the share `most` of all rewards."""
    errors = [error for group in groups for error in group.errors_G]
    reasons = Counter(error for error in errors if error is not None)
    if reasons.total() > most * len(errors):
        listed = "".join(f"\n  {count} x {reason}" for reason, count in reasons.most_common(REASONS_SHOWN))
        raise RewardsFailed(
            f"{reasons.total()} of {len(errors)} rewards of a step could not be computed, more than "
            f"reward.max_error_rate = {most:g}:{listed}"
        )


def check_version(completions: Sequence[Completion], version: int) -> None:
    """A completion of another policy than the one asked for must not be trained on as if it were this one's."""
    for completion in completions:
        # An episode that failed before its first turn was sampled from none.
        if len(completion) and completion.policy_version != version:
            raise RetrainError(
                f"the inference engine sampled from policy version {completion.policy_version}, version {version} was "
                "asked for: the adapter was not taken up"
            )
