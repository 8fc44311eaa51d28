"""An independent oracle: the formulas of the algorithms written out one token at a time, in plain Python floats.

Nothing here is vectorised, shared with the implementation or imported from it. Batches are lists; ragged batches are
lists of lists, one inner list a completion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def linear_logprob(
    hidden: Sequence[float], weight: Sequence[Sequence[float]], target: int, bias: Sequence[float], temperature: float
) -> tuple[float, float]:
    """Log-probability of the target and entropy of the distribution, of one row."""
    logits = [
        (math.fsum(h * w for h, w in zip(hidden, row, strict=True)) + b) / temperature
        for row, b in zip(weight, bias, strict=True)
    ]
    top = max(logits)
    log_partition = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    log_p = [z - log_partition for z in logits]
    return log_p[target], -math.fsum(math.exp(lp) * lp for lp in log_p)


def episode_advantages(
    rewards: Sequence[float], group_ids: Sequence[int], lengths: Sequence[int], mode: str
) -> list[float]:
    groups = {g: [r for r, other in zip(rewards, group_ids, strict=True) if other == g] for g in set(group_ids)}
    if mode == "precomputed":
        return list(rewards)
    result = []
    for r, g in zip(rewards, group_ids, strict=True):
        group = groups[g]
        mean = math.fsum(group) / len(group)
        if all(other == r for other in group):
            result.append(0.0)
        elif mode == "grpo":
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / (len(group) - 1))
            result.append((r - mean) / (deviation + 1e-6))
        elif mode == "rloo":
            result.append(r - (math.fsum(group) - r) / (len(group) - 1))
        elif mode == "maxrl":
            result.append((r - mean) / (mean + 1e-6) if mean > 1e-6 else 0.0)
        else:
            result.append(r - mean)
    if mode == "reinforce_pp":
        informative = [len(set(groups[g])) > 1 for g in group_ids]
        tokens = [a for a, n, ok in zip(result, lengths, informative, strict=True) if ok for _ in range(n)]
        mean = math.fsum(tokens) / len(tokens) if tokens else 0.0
        deviation = math.sqrt(math.fsum((a - mean) ** 2 for a in tokens) / len(tokens)) if tokens else 0.0
        result = [
            (a - mean) / (deviation + 1e-8) if ok and deviation > 1e-8 else 0.0
            for a, ok in zip(result, informative, strict=True)
        ]
    return result


def pool(uncertainty: Sequence[float], planning: Sequence[bool], sepa_lambda: float) -> list[float]:
    """SEPA pooling of one completion."""
    execution = [u for u, plan in zip(uncertainty, planning, strict=True) if not plan]
    if not execution:
        return list(uncertainty)
    mean = math.fsum(execution) / len(execution)
    return [
        u if plan else sepa_lambda * mean + (1 - sepa_lambda) * u for u, plan in zip(uncertainty, planning, strict=True)
    ]


def token_advantages(
    advantage: float,
    uncertainty: Sequence[float],
    planning: Sequence[bool],
    transform: str,
    *,
    beta: float = 0.1,
    alpha: float = 0.2,
    sepa_lambda: float = 0.0,
) -> list[float]:
    """Advantages of one completion's tokens."""
    if not uncertainty:
        return []
    spread = [min(max(u, 0.0), 50.0) for u in uncertainty]
    if "sepa" in transform:
        spread = pool(spread, planning, sepa_lambda)
    mean = math.fsum(spread) / len(spread)
    result = []
    for u, plan in zip(spread, planning, strict=True):
        value = advantage
        if "gtpo" in transform and mean >= 1e-7:
            value = advantage * max(0.0, 1 + beta * (u / mean - 1))
        if "hicra" in transform and plan:
            value = value + alpha * abs(value)
        result.append(value)
    return result


def policy_loss(
    logprob: Sequence[Sequence[float]],
    old: Sequence[Sequence[float]],
    advantages: Sequence[Sequence[float]],
    *,
    kind: str,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    aggregation: str = "token_mean",
    denominator: float | None = None,
    ref: Sequence[Sequence[float]] | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    dual_clip: float = 0.0,
    entropy: Sequence[Sequence[float]] | None = None,
    entropy_coef: float = 0.0,
    weights: Sequence[Sequence[float]] | None = None,
) -> float:
    """The loss of a ragged batch."""
    completions = []
    for i, new in enumerate(logprob):
        log_ratios = [min(max(n - o, -20.0), 20.0) for n, o in zip(new, old[i], strict=True)]
        losses = []
        for t, log_ratio in enumerate(log_ratios):
            a = advantages[i][t]
            ratio = math.exp(math.fsum(log_ratios) / len(log_ratios) if kind == "gspo" else log_ratio)
            bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
            if kind == "importance_sampling":
                loss = -a * ratio
            elif kind == "cispo":
                loss = -bounded * a * new[t]
            else:
                objective = min(ratio * a, bounded * a)
                if dual_clip and a < 0:
                    objective = max(objective, dual_clip * a)
                loss = -objective
            if ref is not None and kl_coef:
                d = min(max(ref[i][t] - new[t], -20.0), 20.0)
                loss += kl_coef * {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kl_estimator]
            if entropy is not None:
                loss -= entropy_coef * entropy[i][t]
            losses.append(loss * (1.0 if weights is None else weights[i][t]))
        completions.append(losses)
    if aggregation == "seq_mean":
        total = math.fsum(math.fsum(losses) / len(losses) for losses in completions if losses)
        return total / (denominator or max(len(completions), 1))
    total = math.fsum(loss for losses in completions for loss in losses)
    return total / (denominator or max(sum(map(len, completions)), 1))
