"""Correction for completions that were sampled from a slightly different policy than the trainer computes.

Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training") and its masked form. Only with recomputed old log-probs: otherwise the policy ratio carries it already.
"""

from __future__ import annotations

from torch import Tensor

from retrain_kernels.packed import owner_of, segment_sum
from retrain_kernels.policy_loss.reference import MAX_LOG_RATIO


def mismatch_weights(
    trainer_logprob_N: Tensor, sampler_logprob_N: Tensor, cu_seqlens: Tensor, *, kind: str, cap: float
) -> Tensor | None:
    """Constant weights [N] of the token losses, from rho = p_trainer / p_sampler; None for kind "none".

    token: min(rho, cap). sequence: min(product of the completion's rho, cap) on each of its tokens.
    mask: 1 where rho <= cap, else 0: the token leaves the loss and stays in the denominator.
    """
    if kind == "none":
        return None
    log_ratio = (trainer_logprob_N - sampler_logprob_N).detach().float()
    if kind == "sequence":
        owner = owner_of(cu_seqlens, len(log_ratio))
        log_ratio = segment_sum(log_ratio, owner, len(cu_seqlens) - 1).float()[owner]
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return (ratio <= cap).float() if kind == "mask" else ratio.clamp(max=cap)
