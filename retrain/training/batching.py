"""Scored groups to the batch that the learner takes: shaping, episode advantages, filtering, planning tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from retrain.algorithm.episode import group_advantages, is_uniform
from retrain.algorithm.overlong import overlong_penalty
from retrain.types import Batch, Group, Rollout

if TYPE_CHECKING:
    from retrain.config import AlgorithmConfig

Detector = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""Completions' token ids, int64 [T] each, to which tokens plan, bool [T] each (`retrain.planning`)."""


@dataclass(frozen=True)
class Credited:
    """What became of a step's groups.

    advantages_PG: as the groups, None where a completion is not trained on because its reward failed.
    batch: the rollouts that are trained on. members: (group, completion) of each rollout, in the batch's order.
    """

    advantages_PG: list[list[float | None]]
    batch: Batch
    members: list[tuple[int, int]]


def shaped_rewards(group: Group, *, overlong_buffer: int, max_tokens: int) -> list[float | None]:
    """Rewards with the overlong penalty (DAPO, arXiv 2503.14476) added: what advantages are computed from."""
    if not overlong_buffer:
        return list(group.rewards_G)
    return [
        None if reward is None else reward + overlong_penalty(len(completion), max_tokens, overlong_buffer)
        for reward, completion in zip(group.rewards_G, group.completions, strict=True)
    ]


def credit(
    groups: Sequence[Group], section: AlgorithmConfig, *, max_tokens: int, detect: Detector, sepa_lambda: float
) -> Credited:
    """Episode advantages of all groups, and the batch of those that carry a gradient (`skip_uniform_groups`)."""
    rewards = [shaped_rewards(g, overlong_buffer=section.overlong_buffer, max_tokens=max_tokens) for g in groups]
    lengths = [[len(completion) for completion in group.completions] for group in groups]
    advantages = group_advantages(rewards, lengths, mode=section.advantage_mode)
    trained = [p for p in range(len(groups)) if not (section.skip_uniform_groups and is_uniform(rewards[p]))]
    place_of = {p: place for place, p in enumerate(trained)}
    # A completion without a sampled token has nothing to train; its reward counts in its group all the same.
    members = [
        (p, g) for p in trained for g, advantage in enumerate(advantages[p]) if advantage is not None and lengths[p][g]
    ]
    completions = [groups[p].completions[g] for p, g in members]
    planning = detect([completion.tokens_T for completion in completions])
    rollouts = tuple(
        Rollout(
            place_of[p],
            completion.tokens_T,
            completion.logprobs_T,
            cast(float, advantages[p][g]),
            planning_T,
            completion.sampled_T,
        )
        for (p, g), completion, planning_T in zip(members, completions, planning, strict=True)
    )
    prompts = tuple(groups[p].prompt_tokens for p in trained)
    return Credited(advantages, Batch(prompts, rollouts, sepa_lambda), members)
