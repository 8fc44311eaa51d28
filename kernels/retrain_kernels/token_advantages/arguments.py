"""Argument checks that read values. A public call reads all of them together: one wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retrain_kernels import checks

# A 0-dim bool tensor that says whether something is wrong, and what raises the error that names it.
Problem = tuple[Tensor, Callable[[], None]]


def check_together(problems: Sequence[Problem]) -> None:
    """Read every flag in one transfer; the first that is set raises. Only then is the culprit looked for."""
    flags = torch.stack([flag for flag, _ in problems]).tolist()
    for found, (_, name_culprit) in zip(flags, problems, strict=True):
        if found:
            name_culprit()


def reward_problems(rewards: Tensor, advantage_mode: str) -> list[Problem]:
    """What can be wrong with the values of rewards [B]: not finite, or outside the interval that "maxrl" takes."""
    problems: list[Problem] = [(~torch.isfinite(rewards).all(), lambda: checks.check_finite("rewards", rewards))]
    if advantage_mode == "maxrl":
        outside = (rewards < 0) | (rewards > 1)
        problems.append((outside.any(), lambda: _name_first_outside(rewards, outside)))
    return problems


def packing_problem(cu_seqlens: Tensor, num_tokens: int) -> Problem:
    """cu_seqlens [B + 1] that does not start at 0, falls, or does not end at num_tokens."""
    wrong = (cu_seqlens[0] != 0) | (cu_seqlens[-1] != num_tokens) | (cu_seqlens[1:] < cu_seqlens[:-1]).any()
    return wrong, lambda: checks.check_cu_seqlens(cu_seqlens, num_tokens, like=cu_seqlens)


def nan_problem(name: str, values: Tensor) -> Problem:
    def name_culprit() -> None:
        raise ValueError(f"{name} must not hold NaN")

    return torch.isnan(values).any(), name_culprit


def _name_first_outside(rewards: Tensor, outside: Tensor) -> None:
    index = int(outside.nonzero()[0])
    raise ValueError(
        f'rewards must lie in [0, 1] with advantage_mode="maxrl", got {rewards[index].item()} at index {index}'
    )
