"""Prompts to scored groups: the sampling half of a step. It changes no state, so a signal may cut it short."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retrain import data
from retrain.algorithm.episode import is_uniform
from retrain.inference import Engine
from retrain.reward import Scorer
from retrain.streams import stream_key
from retrain.training.batching import shaped_rewards
from retrain.training.stopwatch import Stopwatch
from retrain.types import Completion, Example, Group, RetrainError

if TYPE_CHECKING:
    from retrain.config import AlgorithmConfig, DataConfig, TrainingConfig


@dataclass
class Collected:
    """Groups of one step; `groups` are trained on, `uniform` only counted (dynamic sampling set them aside)."""

    groups: list[Group]
    uniform: list[Group]
    prompts_used: int

    @property
    def sampled(self) -> list[Group]:
        return self.groups + self.uniform


@dataclass(frozen=True)
class Collector:
    examples: Sequence[Example]
    prompt_tokens: Sequence[np.ndarray]
    engine: Engine
    scorer: Scorer
    seed: int
    training: TrainingConfig
    algorithm: AlgorithmConfig
    data: DataConfig

    def collect(self, step: int, first_prompt: int, version: int, watch: Stopwatch) -> Collected:
        """Sample and score `batch_size` groups, starting at the run's prompt number `first_prompt`.

        With dynamic sampling (DAPO, arXiv 2503.14476), uniform groups are replaced by those of further prompts.
        """
        wanted, rounds = self.training.batch_size, 1
        if self.algorithm.dynamic_sampling:
            rounds += self.algorithm.max_resample_rounds
        got = Collected([], [], first_prompt)
        for _ in range(rounds):
            for group in self._round(step, got, wanted - len(got.groups), version, watch):
                keep = not self.algorithm.dynamic_sampling or self._is_informative(group)
                (got.groups if keep else got.uniform).append(group)
            if len(got.groups) >= wanted:
                break
        return got

    def _round(self, step: int, got: Collected, count: int, version: int, watch: Stopwatch) -> list[Group]:
        ordinals = range(got.prompts_used, got.prompts_used + count)
        got.prompts_used += count
        places = [
            data.position(ordinal, len(self.examples), seed=self.seed, shuffle=self.data.shuffle)
            for ordinal in ordinals
        ]
        size = self.training.group_size
        streams_PG = np.array(
            [[stream_key(self.seed, "sample", step, ordinal, g) for g in range(size)] for ordinal in ordinals],
            dtype=np.uint64,
        )
        with watch("sample"):
            answers = self.engine.generate(
                [self.prompt_tokens[place] for place in places],
                streams_PG,
                max_tokens=self.training.max_tokens,
                temperature=self.training.temperature,
            )
        for completions in answers:
            check_version(completions, version)
        groups = [
            Group(ordinal, self.examples[place], self.prompt_tokens[place], completions)
            for ordinal, place, completions in zip(ordinals, places, answers, strict=True)
        ]
        with watch("reward"):
            return self._score(groups)

    def _is_informative(self, group: Group) -> bool:
        buffer, limit = self.algorithm.overlong_buffer, self.training.max_tokens
        return not is_uniform(shaped_rewards(group, overlong_buffer=buffer, max_tokens=limit))

    def _score(self, groups: Sequence[Group]) -> list[Group]:
        pairs = [(completion, group.example.reference) for group in groups for completion in group.completions]
        scores = iter(self.scorer.score([completion.text for completion, _ in pairs], [ref for _, ref in pairs]))
        scored = []
        for group in groups:
            verdicts = [next(scores) for _ in group.completions]
            scored.append(
                dataclasses.replace(
                    group,
                    rewards_G=tuple(verdict.value for verdict in verdicts),
                    errors_G=tuple(verdict.error for verdict in verdicts),
                )
            )
        return scored


def check_version(completions: Sequence[Completion], version: int) -> None:
    """A completion of another policy than the one asked for must not be trained on as if it were this one's."""
    for completion in completions:
        if completion.policy_version != version:
            raise RetrainError(
                f"the inference engine sampled from policy version {completion.policy_version}, version {version} was "
                "asked for: the adapter was not taken up"
            )
