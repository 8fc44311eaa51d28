"""token_advantages in plain PyTorch: SEPA pooling, GTPO weighting, HICRA amplification. README.md, part 2."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from retrain_kernels.packed import accumulator_dtype, lengths_of, owner_of, segment_sum
from retrain_kernels.token_advantages.episode import from_groups

MAX_UNCERTAINTY = 50.0
MIN_MEAN_UNCERTAINTY = 1e-7


class Stages(NamedTuple):
    """Which stages a transform runs, in their order."""

    pool: bool
    weigh: bool
    amplify: bool


TRANSFORMS = {
    "none": Stages(pool=False, weigh=False, amplify=False),
    "gtpo": Stages(pool=False, weigh=True, amplify=False),
    "gtpo_hicra": Stages(pool=False, weigh=True, amplify=True),
    "gtpo_sepa": Stages(pool=True, weigh=True, amplify=False),
    "gtpo_sepa_hicra": Stages(pool=True, weigh=True, amplify=True),
}


def active_stages(transform_mode: str, *, gtpo_beta: float, hicra_alpha: float, sepa_lambda: float) -> Stages:
    """The stages of a transform that change anything: one of strength 0 is left out, which is exact to the bit."""
    pool, weigh, amplify = TRANSFORMS[transform_mode]
    weigh = weigh and gtpo_beta != 0
    return Stages(pool=pool and weigh and sepa_lambda != 0, weigh=weigh, amplify=amplify and hicra_alpha != 0)


def token_advantages(
    rewards: Tensor,
    uncertainty: Tensor,
    planning: Tensor,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    *,
    advantage_mode: str,
    transform_mode: str,
    gtpo_beta: float,
    hicra_alpha: float,
    sepa_lambda: float,
) -> Tensor:
    """See `retrain_kernels.token_advantages`; arguments are already checked."""
    stages = active_stages(transform_mode, gtpo_beta=gtpo_beta, hicra_alpha=hicra_alpha, sepa_lambda=sepa_lambda)
    lengths = lengths_of(cu_seqlens)
    owner = owner_of(cu_seqlens, len(uncertainty))
    credit = from_groups(rewards, group_ids, lengths, advantage_mode)[owner]
    if stages.weigh:
        spread = uncertainty.to(accumulator_dtype(uncertainty)).clamp(0.0, MAX_UNCERTAINTY)
        if stages.pool:
            spread = _pool_execution(spread, planning, owner, len(lengths), sepa_lambda)
        credit = (credit * _gtpo_weights(spread, owner, lengths, gtpo_beta)).float()
    if stages.amplify:
        credit = torch.where(planning, credit + hicra_alpha * credit.abs(), credit)
    return credit


def _pool_execution(
    uncertainty: Tensor, planning: Tensor, owner: Tensor, completions: int, sepa_lambda: float
) -> Tensor:
    """Move the uncertainty of execution tokens towards their mean over the completion, by the share sepa_lambda."""
    execution = ~planning
    count = segment_sum(execution, owner, completions)
    mean = segment_sum(uncertainty.masked_fill(planning, 0.0), owner, completions) / count.clamp(min=1)
    return torch.where(execution, sepa_lambda * mean[owner] + (1 - sepa_lambda) * uncertainty, uncertainty)


def _gtpo_weights(uncertainty: Tensor, owner: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """w_t = max(0, 1 + beta (U_t / mean U - 1)), and 1 where a completion's mean is too small to divide by."""
    mean = (segment_sum(uncertainty, owner, len(lengths)) / lengths.clamp(min=1))[owner]
    usable = mean >= MIN_MEAN_UNCERTAINTY
    weights = (1 + beta * (uncertainty / mean.masked_fill(~usable, 1.0) - 1)).clamp(min=0.0)
    return weights.masked_fill(~usable, 1.0)
