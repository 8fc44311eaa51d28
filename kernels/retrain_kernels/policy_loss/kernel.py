"""policy_loss in one Triton kernel: a program takes a completion, and leaves its sums and its tokens' gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from retrain_kernels import dispatch
from retrain_kernels.packed import lengths_of, owner_of
from retrain_kernels.policy_loss.reference import MAX_LOG_RATIO, Objective

# README.md, "Kernel". Eight tokens a thread keep enough loads in flight; more would cost occupancy.
BLOCK = 1024
NUM_WARPS = 4

_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)
# README.md, "Numerics": where the series of k3 takes over, and how many terms that needs.
_K3_SERIES_BELOW = tl.constexpr(1.0)
_K3_SERIES_TERMS = tl.constexpr(10)


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    objective: Objective,
    aggregation: str,
    denominator: float | None,
    ref_logprob: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    entropy: Tensor | None,
    entropy_coef: float,
    weights: Tensor | None,
    block: int = BLOCK,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See retrain_kernels.policy_loss; arguments are already checked.

    block: tokens that a program holds at once, a power of two; a longer completion takes several turns.
    """
    completions, tokens = len(cu_seqlens) - 1, len(logprob)
    seq_mean = aggregation == "seq_mean"
    weights = None if weights is None else weights.detach()
    optional = {"ref_kl_sum": ref_logprob, "entropy_sum": entropy}
    columns = ["loss", "tokens", "ratio_sum", "clipped_sum", "kl_sum"]
    columns += [name for name, vector in optional.items() if vector is not None]
    sums = logprob.new_empty((completions, len(columns)), dtype=torch.float32)
    differentiable = torch.is_grad_enabled() and logprob.requires_grad
    grad = logprob.new_empty(tokens, dtype=torch.float32) if differentiable else None
    if completions:
        inputs = (logprob, old_logprob, advantages, cu_seqlens, ref_logprob, entropy, weights)
        with dispatch.on_device(logprob.device):
            launch: Any = policy_loss_kernel[(completions,)]
            launch(
                *(None if x is None else x.detach().contiguous() for x in inputs),
                sums,
                grad,
                1.0 - objective.clip_low,
                1.0 + objective.clip_high,
                float(objective.dual_clip) or None,
                float(kl_coef) or None,
                float(entropy_coef) or None,
                KIND=objective.kind,
                KL_ESTIMATOR=kl_estimator,
                SEQ_MEAN=seq_mean,
                COLUMNS=len(columns),
                BLOCK=block,
                num_warps=NUM_WARPS,
            )
    totals = dict(zip(columns, sums.sum(dim=0, dtype=torch.float64).float().unbind(), strict=True))
    if denominator is None:
        denominator = max(completions if seq_mean else tokens, 1)
    loss = _Loss.apply(
        logprob,
        entropy if entropy_coef else None,
        totals.pop("loss"),
        denominator,
        grad,
        entropy_coef,
        weights,
        cu_seqlens if seq_mean else None,
    )
    return loss, totals  # type: ignore[return-value]


class _Loss(torch.autograd.Function):
    """The loss from its sum, with the gradients that are already known: backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        logprob: Tensor,
        entropy: Tensor | None,
        total: Tensor,
        denominator: float,
        grad: Tensor | None,
        entropy_coef: float,
        weights: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """grad [N] is d total / d logprob. cu_seqlens is given where a completion's terms are divided by its length."""
        through_entropy = ctx.needs_input_grad[1]
        ctx.save_for_backward(grad, weights if through_entropy else None, cu_seqlens if through_entropy else None)
        ctx.denominator, ctx.entropy_coef = denominator, entropy_coef
        ctx.tokens, ctx.dtype = len(logprob), logprob.dtype
        ctx.entropy_dtype = None if entropy is None else entropy.dtype
        return total / denominator

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, weights, cu_seqlens = ctx.saved_tensors
        scale = grad_loss / ctx.denominator
        grad_logprob = (grad * scale).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_entropy = None
        if ctx.needs_input_grad[1]:
            share = -ctx.entropy_coef * scale
            if cu_seqlens is not None:
                share = (share / lengths_of(cu_seqlens))[owner_of(cu_seqlens, ctx.tokens)]
            if weights is not None:
                share = share * weights.float()
            grad_entropy = share.to(ctx.entropy_dtype).expand(ctx.tokens)
        return grad_logprob, grad_entropy, None, None, None, None, None, None


@triton.jit
def policy_loss_kernel(
    logprob,
    old_logprob,
    advantages,
    cu_seqlens,
    ref_logprob,
    entropy,
    weights,
    sums,
    grad,
    clip_min,
    clip_max,
    dual_clip,
    kl_coef,
    entropy_coef,
    KIND: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    SEQ_MEAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One completion's row of sums [B, COLUMNS], and its tokens' gradient [N], both before the common denominator.

    Vectors and coefficients that are absent come as None, and their terms are not compiled.
    """
    completion = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_seqlens + completion).to(tl.int64)
    # A batch may hold more than 2^31 tokens, one completion does not: 64 bits once, 32 in the loops.
    length = (tl.load(cu_seqlens + completion + 1).to(tl.int64) - begin).to(tl.int32)
    logprob += begin
    old_logprob += begin
    advantages += begin
    if ref_logprob is not None:
        ref_logprob += begin
    if entropy is not None:
        entropy += begin
    if weights is not None:
        weights += begin
    if grad is not None:
        grad += begin
    share = 1.0 / tl.maximum(length, 1).to(tl.float32) if SEQ_MEAN else 1.0
    if KIND == "gspo":
        sequence_ratio, sequence_slope = _sequence(
            logprob, old_logprob, advantages, weights, grad, length, clip_min, clip_max, BLOCK
        )

    loss_sum = tl.zeros([BLOCK], tl.float32)
    ratio_sum = tl.zeros([BLOCK], tl.float32)
    clipped_sum = tl.zeros([BLOCK], tl.float32)
    kl_sum = tl.zeros([BLOCK], tl.float32)
    ref_kl_sum = tl.zeros([BLOCK], tl.float32)
    entropy_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        # Beyond the end every input reads as 0: only the ratio, 1 there, has to be masked out of its sum.
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < length
        new = _load(logprob, offsets, mask)
        advantage = _load(advantages, offsets, mask)
        log_ratio, moves = _clamp(new - _load(old_logprob, offsets, mask), -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        if KIND == "gspo":
            ratio = sequence_ratio
        else:
            ratio = tl.exp(log_ratio)
        bounded, inside = _clamp(ratio, clip_min, clip_max)

        if KIND == "importance_sampling":
            loss = -advantage * ratio
            slope = tl.where(moves, loss, 0.0)
        elif KIND == "cispo":
            slope = -bounded * advantage
            loss = slope * new
            clipped_sum += tl.where(inside, 0.0, 1.0)
        else:
            loss, slope, clipped = _pessimistic(ratio, bounded, inside, advantage, dual_clip)
            clipped_sum += clipped.to(tl.float32)
            # gspo's ratio moves with the whole completion: its slope is known, and joins below.
            slope = tl.where(moves, slope * ratio, 0.0) if KIND == "ppo" else tl.zeros([BLOCK], tl.float32)
        if ref_logprob is not None:
            gap, gap_moves = _clamp(_load(ref_logprob, offsets, mask) - new, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
            kl, kl_slope = _kl(gap, KL_ESTIMATOR)
            ref_kl_sum += kl
            if kl_coef is not None:
                loss += kl_coef * kl
                slope -= tl.where(gap_moves, kl_coef * kl_slope, 0.0)
        if entropy is not None:
            nats = _load(entropy, offsets, mask)
            entropy_sum += nats
            if entropy_coef is not None:
                loss -= entropy_coef * nats
        if weights is not None:
            weight = _load(weights, offsets, mask)
            loss *= weight
            slope *= weight
        if KIND == "gspo":
            slope += tl.where(moves, sequence_slope, 0.0)

        loss_sum += loss
        ratio_sum += tl.where(mask, ratio, 0.0)
        kl_sum -= log_ratio
        if grad is not None:
            tl.store(grad + offsets, slope * share, mask)

    row = sums + completion * COLUMNS
    tl.store(row, tl.sum(loss_sum) * share)
    tl.store(row + 1, length.to(tl.float32))
    tl.store(row + 2, tl.sum(ratio_sum))
    if KIND == "importance_sampling":
        tl.store(row + 3, 0.0)
    else:
        tl.store(row + 3, tl.sum(clipped_sum))
    tl.store(row + 4, tl.sum(kl_sum))
    if ref_logprob is not None:
        tl.store(row + 5, tl.sum(ref_kl_sum))
    if entropy is not None:
        tl.store(row + COLUMNS - 1, tl.sum(entropy_sum))


@triton.jit
def _sequence(logprob, old_logprob, advantages, weights, grad, length, clip_min, clip_max, BLOCK: tl.constexpr):
    """gspo's ratio of one completion and, with a grad to fill, the slope of its surrogate in each token's log-ratio."""
    log_ratio_sum = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    negative = tl.zeros([BLOCK], tl.float32)
    positive = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < length
        gap = _load(logprob, offsets, mask) - _load(old_logprob, offsets, mask)
        log_ratio, _ = _clamp(gap, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        log_ratio_sum += log_ratio
        if grad is not None:
            advantage = _load(advantages, offsets, mask)
            weighted = advantage * _load(weights, offsets, mask) if weights is not None else advantage
            total += weighted
            negative += tl.where(advantage > 0, 0.0, weighted)
            positive += tl.where(advantage < 0, 0.0, weighted)
    size = tl.maximum(length, 1).to(tl.float32)
    ratio = tl.exp(tl.sum(log_ratio_sum) / size)
    # Above the interval only the terms of negative advantage depend on the ratio, below it only the positive ones.
    live = tl.where(ratio > clip_max, tl.sum(negative), tl.where(ratio < clip_min, tl.sum(positive), tl.sum(total)))
    return ratio, -live * ratio / size


@triton.jit
def _pessimistic(ratio, bounded_ratio, inside, advantage, dual_clip):
    """-min(ratio A, clip(ratio) A), at most -dual_clip A for A < 0; its slope in the ratio; whether it is clipped."""
    free, bounded = -ratio * advantage, -bounded_ratio * advantage
    loss, clipped = tl.maximum(free, bounded), bounded > free
    # The reference's subgradient: the maximum of two equal numbers takes half from each, and a clip at its bound moves.
    free_share = tl.where(free > bounded, 1.0, tl.where(free == bounded, 0.5, 0.0))
    slope = tl.where(inside, -advantage, -advantage * free_share)
    if dual_clip is not None:
        ceiling = -dual_clip * advantage
        over = (advantage < 0) & (loss > ceiling)
        loss, slope, clipped = tl.where(over, ceiling, loss), tl.where(over, 0.0, slope), clipped | over
    return loss, slope, clipped


@triton.jit
def _kl(gap, ESTIMATOR: tl.constexpr):
    """The estimate for gap = l_ref - l, and its slope in the gap."""
    if ESTIMATOR == "k1":
        kl, slope = -gap, tl.full(gap.shape, -1.0, tl.float32)
    elif ESTIMATOR == "k2":
        kl, slope = gap * gap * 0.5, gap
    else:
        # gap^2/2 (1 + gap/3 (1 + gap/4 (...)))
        series = tl.full(gap.shape, 1.0, tl.float32)
        for i in tl.static_range(_K3_SERIES_TERMS - 1):  # type: ignore[reportGeneralTypeIssues]
            series = 1.0 + gap * series * (1.0 / (_K3_SERIES_TERMS + 1 - i))
        kl = tl.where(tl.abs(gap) < _K3_SERIES_BELOW, gap * gap * 0.5 * series, tl.exp(gap) - 1.0 - gap)
        # exp(gap) - 1, without its cancellation.
        slope = kl + gap
    return kl, slope


@triton.jit
def _clamp(value, low, high):
    """value within [low, high], and whether it was there already. A NaN stays one."""
    clamped = tl.clamp(value, low, high, propagate_nan=tl.PropagateNan.ALL)
    return clamped, clamped == value


@triton.jit
def _load(vector, offsets, mask):
    return tl.load(vector + offsets, mask, other=0.0).to(tl.float32)
