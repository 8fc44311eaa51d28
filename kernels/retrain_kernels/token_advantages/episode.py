"""Episode advantages: what a completion's reward is worth beside the other rewards of its group. README.md, part 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retrain_kernels import checks
from retrain_kernels.packed import accumulator_dtype, segment_sum
from retrain_kernels.token_advantages.arguments import check_together, reward_problems

GRPO_EPS = 1e-6
MAXRL_EPS = 1e-6
WHITEN_EPS = 1e-8


@dataclass(frozen=True)
class _Groups:
    """Rewards beside their group's statistics, one entry a completion: everything is [B], in the accumulator dtype.

    centred: reward minus group mean. variance: of the sample (ddof = 1). uniform: bool, all rewards of the group equal.
    """

    centred: Tensor
    mean: Tensor
    variance: Tensor
    size: Tensor
    uniform: Tensor
    lengths: Tensor


def _grpo(g: _Groups) -> Tensor:
    return g.centred / (g.variance.sqrt() + GRPO_EPS)


def _dr_grpo(g: _Groups) -> Tensor:
    return g.centred


def _rloo(g: _Groups) -> Tensor:
    # r_i minus the mean of the others is (r_i - m) G / (G - 1).
    return g.centred * g.size / (g.size - 1).clamp(min=1)


def _maxrl(g: _Groups) -> Tensor:
    return torch.where(g.mean > MAXRL_EPS, g.centred / (g.mean + MAXRL_EPS), 0.0)


def _reinforce_pp(g: _Groups) -> Tensor:
    # Uniform groups say nothing about the spread of the advantages, and would shrink it.
    tokens = g.lengths.masked_fill(g.uniform, 0)
    total = tokens.sum().clamp(min=1)
    mean = (tokens * g.centred).sum() / total
    spread = ((tokens * (g.centred - mean).square()).sum() / total).sqrt()
    return torch.where(spread > WHITEN_EPS, (g.centred - mean) / (spread + WHITEN_EPS), 0.0)


_MODES: dict[str, Callable[[_Groups], Tensor]] = {
    "grpo": _grpo,  # arXiv 2402.03300
    "dr_grpo": _dr_grpo,  # arXiv 2503.20783
    "rloo": _rloo,  # arXiv 2402.14740
    "reinforce_pp": _reinforce_pp,  # arXiv 2501.03262
    "maxrl": _maxrl,  # arXiv 2602.02710
}

ADVANTAGE_MODES = (*_MODES, "precomputed")


@torch.no_grad()
def episode_advantages(rewards: Tensor, group_ids: Tensor, lengths: Tensor, *, advantage_mode: str) -> Tensor:
    """Advantage of each completion within its group: [B] float32.

    rewards: [B] floating and finite; group_ids: [B] integer, in any order; lengths: [B] integer, tokens of each
    completion, which only "reinforce_pp" looks at. advantage_mode: one of ADVANTAGE_MODES; "precomputed" returns the
    rewards. A group whose rewards are all equal, of one completion or of many, gets exactly 0.
    Raises TypeError or ValueError naming the argument; "maxrl" takes only rewards in [0, 1].
    """
    checks.check_choice("advantage_mode", advantage_mode, ADVANTAGE_MODES)
    checks.check_tensor("rewards", rewards, {"B": None})
    checks.check_tensor("group_ids", group_ids, {"B": len(rewards)}, kind="integer", like=rewards)
    checks.check_tensor("lengths", lengths, {"B": len(rewards)}, kind="integer", like=rewards)
    check_together(reward_problems(rewards, advantage_mode))
    return from_groups(rewards, group_ids, lengths, advantage_mode)


def from_groups(rewards: Tensor, group_ids: Tensor, lengths: Tensor, advantage_mode: str) -> Tensor:
    """What `episode_advantages` returns, of arguments that are already checked."""
    if advantage_mode == "precomputed":
        return rewards.to(torch.float32, copy=True)
    groups = _group_statistics(rewards, group_ids, lengths)
    return _MODES[advantage_mode](groups).masked_fill(groups.uniform, 0.0).float()


def _group_statistics(rewards: Tensor, group_ids: Tensor, lengths: Tensor) -> _Groups:
    ids, group = torch.unique(group_ids, return_inverse=True)
    values = rewards.to(accumulator_dtype(rewards))
    size = segment_sum(torch.ones_like(values), group, len(ids))
    mean = segment_sum(values, group, len(ids)) / size
    centred = values - mean[group]
    variance = segment_sum(centred.square(), group, len(ids)) / (size - 1).clamp(min=1)
    # Equality is decided on the rewards themselves: a computed variance of equal numbers need not be 0.
    empty = values.new_empty(len(ids))
    low = empty.scatter_reduce(0, group, values, "amin", include_self=False)
    high = empty.scatter_reduce(0, group, values, "amax", include_self=False)
    return _Groups(
        centred=centred,
        mean=mean[group],
        variance=variance[group],
        size=size[group],
        uniform=(low == high)[group],
        lengths=lengths.to(values.dtype),
    )
