"""policy_loss in plain PyTorch. README.md derives each objective and says why the sums split over micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retrain_kernels.packed import lengths_of, owner_of, segment_sum

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Objective:
    """The surrogate and its bounds: the ratio is clipped to [1 - clip_low, 1 + clip_high]; dual_clip 0 means off."""

    kind: str
    clip_low: float
    clip_high: float
    dual_clip: float

    def clip(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(1 - self.clip_low, 1 + self.clip_high)


@dataclass(frozen=True)
class _Tokens:
    """What a surrogate sees, all [N]; log_ratio is already clamped."""

    logprob: Tensor
    log_ratio: Tensor
    advantages: Tensor
    owner: Tensor
    lengths: Tensor


# Each surrogate returns, per token: its loss (with gradient), the ratio, and whether the clipping was active.
_Surrogate = Callable[[_Tokens, Objective], tuple[Tensor, Tensor, Tensor]]


def _importance_sampling(tokens: _Tokens, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    ratio = tokens.log_ratio.exp()
    return -tokens.advantages * ratio, ratio, torch.zeros_like(ratio, dtype=torch.bool)


def _ppo(tokens: _Tokens, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    ratio = tokens.log_ratio.exp()
    return _pessimistic(ratio, tokens.advantages, objective)


def _cispo(tokens: _Tokens, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    ratio = tokens.log_ratio.exp().detach()
    bounded = objective.clip(ratio)
    return -bounded * tokens.advantages * tokens.logprob, ratio, bounded != ratio


def _gspo(tokens: _Tokens, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    mean = segment_sum(tokens.log_ratio, tokens.owner, len(tokens.lengths)) / tokens.lengths.clamp(min=1)
    ratio = mean.to(tokens.log_ratio.dtype).exp()[tokens.owner]
    return _pessimistic(ratio, tokens.advantages, objective)


def _pessimistic(ratio: Tensor, advantages: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """-min(ratio A, clip(ratio) A), bounded by -dual_clip A for A < 0."""
    free, bounded = -ratio * advantages, -objective.clip(ratio) * advantages
    loss, clipped = torch.maximum(free, bounded), bounded > free
    if objective.dual_clip:
        ceiling = -objective.dual_clip * advantages
        over = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(over, ceiling, loss), clipped | over
    return loss, ratio, clipped


KINDS: dict[str, _Surrogate] = {
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,  # arXiv 1707.06347; clip_high > clip_low: DAPO, arXiv 2503.14476; dual_clip: arXiv 1912.09729
    "cispo": _cispo,  # MiniMax-M1, arXiv 2506.13585
    "gspo": _gspo,  # arXiv 2507.18071
}

# Estimates of KL(policy || reference) from d = l_ref - l of a sampled token (Schulman, "Approximating KL divergence").
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: d.expm1() - d,
}

AGGREGATIONS = ("token_mean", "seq_mean", "constant")


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """See retrain_kernels.policy_loss; arguments are already checked."""
    dtype = torch.float64 if logprob.dtype == torch.float64 else torch.float32
    logprob = logprob.to(dtype)
    log_ratio = (logprob - old_logprob.detach().to(dtype)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    lengths = lengths_of(cu_seqlens)
    owner = owner_of(cu_seqlens, len(logprob))
    tokens = _Tokens(
        logprob=logprob,
        log_ratio=log_ratio,
        advantages=advantages.detach().to(dtype),
        owner=owner,
        lengths=lengths,
    )
    loss, ratio, clipped = KINDS[objective.kind](tokens, objective)
    sums = {"ratio_sum": ratio, "clipped_sum": clipped, "kl_sum": -log_ratio}
    if ref_logprob is not None:
        gap = (ref_logprob.detach().to(dtype) - logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ref_kl = KL_ESTIMATORS[kl_estimator](gap)
        sums["ref_kl_sum"] = ref_kl
        if kl_coef:
            loss = loss + kl_coef * ref_kl
    if entropy is not None:
        sums["entropy_sum"] = entropy
        if entropy_coef:
            loss = loss - entropy_coef * entropy.to(dtype)
    if weights is not None:
        loss = loss * weights.detach().to(dtype)
    metrics = {name: value.detach().to(dtype).sum() for name, value in sums.items()}
    metrics["tokens"] = logprob.new_full((), len(logprob))
    return _aggregate(loss, owner, lengths, aggregation, denominator), metrics


def _aggregate(loss: Tensor, owner: Tensor, lengths: Tensor, aggregation: str, denominator: float | None) -> Tensor:
    if aggregation == "seq_mean":
        loss = loss / lengths.to(loss.dtype)[owner]
    own = len(lengths) if aggregation == "seq_mean" else len(loss)
    return loss.sum() / (max(own, 1) if denominator is None else denominator)
