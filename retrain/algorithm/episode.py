"""Episode advantages of scored groups: which completions take part, and what each one's reward is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from retrain.algorithm.choices import check_choice
from retrain.algorithm.plugins import load_tensor_function
from retrain.plugin import is_dotted_path
from retrain.types import RetrainError
from retrain_kernels.token_advantages import ADVANTAGE_MODES, episode_advantages

KEY = "algorithm.advantage_mode"

# "precomputed" is how the engine hands these advantages on to micro-batches, not a way to compute them.
MODES = tuple(mode for mode in ADVANTAGE_MODES if mode != "precomputed")

Rewards = Sequence[Sequence[float | None]]


def group_advantages(rewards: Rewards, lengths: Sequence[Sequence[int]], *, mode: str) -> list[list[float | None]]:
    """Episode advantage of every completion of a step, in the layout of rewards: one list a group.

    rewards: None where the reward could not be computed. Such a completion leaves its group before any statistic is
    taken and gets None; a group that errors leave with fewer than two gets None throughout: it is not trained on.
    A group that was sampled with a single completion has nothing to compare with: 0.
    lengths: completion tokens, in the same layout; "reinforce_pp" weighs its statistics by them.
    mode: one of MODES, or a dotted path to fn(rewards: Tensor[G] float32) -> Tensor[G], called once a group.

    Raises ConfigError for an unknown mode or a plug-in that cannot be loaded; RetrainError for a reward that is not
    finite or (for "maxrl") outside [0, 1], and for a plug-in that fails.
    """
    if not is_dotted_path(mode):
        check_choice(KEY, mode, MODES, plugin=True)
    _check_rewards(rewards, mode)
    kept = [(g, i) for g, group in enumerate(rewards) for i in _kept(group)]
    advantages: list[list[float | None]] = [[None] * len(group) for group in rewards]
    values = _by_plugin(rewards, kept, mode) if is_dotted_path(mode) else _built_in(rewards, lengths, kept, mode)
    for (g, i), value in zip(kept, values, strict=True):
        advantages[g][i] = value
    return advantages


def is_uniform(rewards: Sequence[float | None]) -> bool:
    """Whether a group's computed rewards are all equal, so that it carries no gradient; so are fewer than two."""
    return len({reward for reward in rewards if reward is not None}) < 2


def _kept(group: Sequence[float | None]) -> list[int]:
    scored = [i for i, reward in enumerate(group) if reward is not None]
    return scored if len(scored) >= min(2, len(group)) else []


def _built_in(
    rewards: Rewards, lengths: Sequence[Sequence[int]], kept: list[tuple[int, int]], mode: str
) -> list[float]:
    return episode_advantages(
        torch.tensor([rewards[g][i] for g, i in kept], dtype=torch.float64),
        torch.tensor([g for g, _ in kept], dtype=torch.int64),
        torch.tensor([lengths[g][i] for g, i in kept], dtype=torch.int64),
        advantage_mode=mode,
    ).tolist()


def _by_plugin(rewards: Rewards, kept: list[tuple[int, int]], path: str) -> list[float]:
    function = load_tensor_function(path, what=KEY, parameters=["rewards[G]"])
    values: list[float] = []
    for index in range(len(rewards)):
        group = torch.tensor([rewards[g][i] for g, i in kept if g == index], dtype=torch.float32)
        if len(group) > 1:
            values += function(group, size=len(group)).tolist()
        else:
            values += [0.0] * len(group)
    return values


def _check_rewards(rewards: Rewards, mode: str) -> None:
    for g, group in enumerate(rewards):
        for i, reward in enumerate(group):
            place = f"reward {reward} of completion {i} in group {g}"
            if reward is None:
                continue
            if not math.isfinite(reward):
                raise RetrainError(f"{place} is not finite; a reward that cannot be computed must raise instead")
            if mode == "maxrl" and not 0 <= reward <= 1:
                raise RetrainError(
                    f'{place} is outside [0, 1], where {KEY} = "maxrl" is defined; '
                    'rescale the reward (with overlong_buffer too), or use "grpo", "dr_grpo" or "rloo"'
                )
