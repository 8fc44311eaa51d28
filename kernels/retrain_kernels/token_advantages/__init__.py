"""token_advantages: from one reward a completion to one advantage a token."""

from __future__ import annotations

import torch
from torch import Tensor

from retrain_kernels import checks, dispatch
from retrain_kernels.token_advantages.arguments import check_together, nan_problem, packing_problem, reward_problems
from retrain_kernels.token_advantages.episode import ADVANTAGE_MODES, episode_advantages
from retrain_kernels.token_advantages.reference import TRANSFORMS

TRANSFORM_MODES = tuple(TRANSFORMS)

__all__ = ["ADVANTAGE_MODES", "TRANSFORM_MODES", "episode_advantages", "token_advantages"]


@torch.no_grad()
def token_advantages(
    rewards: Tensor,
    uncertainty: Tensor,
    planning: Tensor,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    *,
    advantage_mode: str,
    transform_mode: str,
    gtpo_beta: float = 0.1,
    hicra_alpha: float = 0.2,
    sepa_lambda: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Advantage of every token: an episode advantage from the group's rewards, then a token-level transform.

    rewards: [B] floating; group_ids: [B] integer, equal for the completions of one prompt, in any order.
    uncertainty: [N] floating, never NaN, clamped to [0, 50] here; planning: [N] bool. cu_seqlens: [B + 1] integer:
    completion i owns tokens cu_seqlens[i]:cu_seqlens[i + 1]; empty completions are legal.
    advantage_mode: one of ADVANTAGE_MODES; "precomputed" takes rewards as the episode advantages themselves, for
    batches that hold only a part of a group. transform_mode: one of TRANSFORM_MODES. sepa_lambda in [0, 1].

    Returns [N] float32, a constant for the gradient. Raises TypeError or ValueError naming the argument, RuntimeError
    where impl cannot run. Formulas, sources and edge cases: README.md.
    """
    checks.check_tensor("rewards", rewards, {"B": None})
    checks.check_tensor("uncertainty", uncertainty, {"N": None}, like=rewards)
    num_tokens = len(uncertainty)
    checks.check_tensor("planning", planning, {"N": num_tokens}, kind="bool", like=rewards)
    checks.check_tensor("cu_seqlens", cu_seqlens, {"B + 1": None}, kind="integer", like=rewards)
    if len(cu_seqlens) != len(rewards) + 1:
        # What is wrong with it in itself says more than its length does.
        checks.check_cu_seqlens(cu_seqlens, num_tokens, like=rewards)
        raise ValueError(f"cu_seqlens must have shape [B + 1={len(rewards) + 1}], got {list(cu_seqlens.shape)}")
    checks.check_tensor("group_ids", group_ids, {"B": len(rewards)}, kind="integer", like=rewards)
    checks.check_choice("advantage_mode", advantage_mode, ADVANTAGE_MODES)
    checks.check_choice("transform_mode", transform_mode, TRANSFORM_MODES)
    checks.check_number("gtpo_beta", gtpo_beta)
    checks.check_number("hicra_alpha", hicra_alpha)
    checks.check_number("sepa_lambda", sepa_lambda, high=1.0)
    check_together(
        [
            packing_problem(cu_seqlens, num_tokens),
            nan_problem("uncertainty", uncertainty),
            *reward_problems(rewards, advantage_mode),
        ]
    )
    compute = dispatch.implementation("token_advantages", impl, rewards.device)
    return compute(
        rewards,
        uncertainty,
        planning,
        cu_seqlens,
        group_ids,
        advantage_mode=advantage_mode,
        transform_mode=transform_mode,
        gtpo_beta=gtpo_beta,
        hicra_alpha=hicra_alpha,
        sepa_lambda=sepa_lambda,
    )
