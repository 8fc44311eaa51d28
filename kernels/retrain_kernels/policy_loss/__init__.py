"""policy_loss: the policy-gradient objective of a packed batch, its KL and entropy terms, and their sums to log."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retrain_kernels import checks, dispatch
from retrain_kernels.policy_loss import reference
from retrain_kernels.policy_loss.reference import AGGREGATIONS, KINDS, KL_ESTIMATORS

__all__ = ["AGGREGATIONS", "KINDS", "KL_ESTIMATORS", "policy_loss"]


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    kind: str,
    clip_low: float,
    clip_high: float,
    aggregation: str,
    denominator: float | None = None,
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    impl: str = "auto",
    dual_clip: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss to minimise over the completions of a packed batch, and sums to log.

    All vectors are [N] floating, one entry a completion token; cu_seqlens is [B + 1] integer.
    logprob: log-probability of each token under the trained policy. The gradient flows through it, and through
    entropy; everything else is a constant. old_logprob: under the policy that sampled. ref_logprob: under the frozen
    base; required where kl_coef is not 0. entropy: of each next-token distribution, in nats; required where
    entropy_coef is not 0. weights: multiplies each token's loss, all terms of it; 0 drops a token from the sum but
    not from the denominator.
    kind: one of KINDS; clip_low and clip_high bound the ratio to [1 - clip_low, 1 + clip_high] ("importance_sampling"
    does not clip); dual_clip: 0 (off) or a bound > 1 on the ratio where the advantage is negative, "ppo" only.
    kl_estimator: one of KL_ESTIMATORS. aggregation: one of AGGREGATIONS.
    denominator: what the sum is divided by: the tokens of the whole optimizer step ("token_mean"), its completions
    ("seq_mean"), its completions * max_tokens ("constant"). With it given, the losses and the gradients of the
    micro-batches of a step add up to those of the whole batch, wherever it is cut between completions. None means
    this batch's own tokens or completions, and is an error with "constant".

    Returns (loss, metrics). loss: 0-dim, float32 (float64 for a float64 logprob), differentiable once; 0, with a graph,
    where N = 0.
    metrics: detached 0-dim *sums* over tokens, to be added up over micro-batches and divided by `tokens` at the end:
    tokens, ratio_sum, clipped_sum, kl_sum (old - new: the k1 estimate), and where their inputs are given ref_kl_sum
    (kl_estimator), entropy_sum. Raises TypeError or ValueError naming the argument, RuntimeError where impl cannot run.
    """
    checks.check_tensor("logprob", logprob, {"N": None})
    vectors = {"old_logprob": old_logprob, "advantages": advantages}
    optional = {"ref_logprob": ref_logprob, "entropy": entropy, "weights": weights}
    vectors.update((name, vector) for name, vector in optional.items() if vector is not None)
    for name, vector in vectors.items():
        checks.check_tensor(name, vector, {"N": len(logprob)}, like=logprob)
    checks.check_cu_seqlens(cu_seqlens, len(logprob), like=logprob)
    checks.check_choice("kind", kind, KINDS)
    checks.check_choice("aggregation", aggregation, AGGREGATIONS)
    checks.check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    checks.check_number("clip_low", clip_low, high=1.0)
    checks.check_number("clip_high", clip_high)
    checks.check_number("kl_coef", kl_coef)
    checks.check_number("entropy_coef", entropy_coef, low=-math.inf)
    _check_dual_clip(dual_clip, kind)
    _check_denominator(denominator, aggregation)
    if kl_coef != 0 and ref_logprob is None:
        raise ValueError(f"ref_logprob is required where kl_coef is not 0 (got kl_coef={kl_coef})")
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy is required where entropy_coef is not 0 (got entropy_coef={entropy_coef})")
    compute = dispatch.implementation("policy_loss", impl, logprob.device, float64=logprob.dtype == torch.float64)
    return compute(
        logprob,
        old_logprob,
        advantages,
        cu_seqlens,
        objective=reference.Objective(kind, clip_low, clip_high, dual_clip),
        aggregation=aggregation,
        denominator=denominator,
        ref_logprob=ref_logprob,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy=entropy,
        entropy_coef=entropy_coef,
        weights=weights,
    )


def _check_dual_clip(dual_clip: float, kind: str) -> None:
    if dual_clip == 0:
        return
    if kind != "ppo":
        raise ValueError(f'dual_clip belongs to kind="ppo", got dual_clip={dual_clip} with kind={kind!r}')
    if not (math.isfinite(dual_clip) and dual_clip > 1):
        raise ValueError(f"dual_clip must be 0 (off) or a finite number > 1, got {dual_clip}")


def _check_denominator(denominator: float | None, aggregation: str) -> None:
    if denominator is None:
        if aggregation == "constant":
            raise ValueError('denominator is required with aggregation="constant": completions * max_tokens')
    elif not (math.isfinite(denominator) and denominator > 0):
        raise ValueError(f"denominator must be None or a finite number > 0, got {denominator}")
