"""One object per finished step: the keys of metrics.jsonl, all of them from the first step on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retrain.types import Batch, Group, StepResult

# Rewards are verdicts between wrong (0) and right (1); a graded one counts as right above the middle.
CORRECT = 0.5
RUNNING_STEPS = 10

FROM_LEARNER = (
    "loss",
    "grad_norm",
    "lr",
    "entropy_mean",
    "exec_entropy_mean",
    "exec_entropy_var",
    "plan_entropy_mean",
    "plan_entropy_var",
    "planning_fraction",
    "logprob_gap_mean",
    "logprob_gap_max",
    "ratio_mean",
    "clip_fraction",
    "ref_kl",
    "micro_batch_tokens",
)
# Of `retrain.backpressure.Controller`; null without it.
BACKPRESSURE = tuple(
    f"bp_{figure}"
    for figure in ("action", "regime", "p", "p_star", "scale", "sigma", "kappa", "throughput", "roofline")
)
JUDGE = tuple(f"judge_{figure}" for figure in ("requests", "cached", "prompt_tokens", "completion_tokens", "latency_s"))
# Of what a service was asked; null where there is none.
SERVICE = ("service_requests", "service_retries", "service_rate_limits")
# Of a step, timed: `<stage>_time_s`.
STAGES = ("sample", "reward", "wait", "train", "sync")
# What may differ between two runs that are otherwise equal bit for bit.
MEASURED = (
    *(f"{stage}_time_s" for stage in STAGES),
    "step_time_s",
    "tokens_per_s",
    "peak_memory_bytes",
    "servers_alive",
    *BACKPRESSURE,
    *JUDGE,
    *SERVICE,
)


@dataclass(frozen=True)
class RewardSummary:
    """What the rewards of a step say. Rates are over the completions whose reward could be computed, None if none.

    parts: mean of each of `[[reward.parts]]`, over the completions that it could judge.
    """

    mean_reward: float | None
    correct_rate: float | None
    reward_errors: int
    groups_all_correct: int
    groups_all_wrong: int
    completion_tokens: int
    max_token_hit_rate: float
    parts: dict[str, float | None]


def summarize(groups: Sequence[Group]) -> RewardSummary:
    """Over every completion that was sampled in the step, those set aside by dynamic sampling included."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = [reward for group in groups for reward in group.rewards_G if reward is not None]
    verdicts = [[r > CORRECT for r in group.rewards_G if r is not None] for group in groups]
    return RewardSummary(
        mean_reward=sum(rewards) / len(rewards) if rewards else None,
        correct_rate=sum(r > CORRECT for r in rewards) / len(rewards) if rewards else None,
        reward_errors=len(completions) - len(rewards),
        groups_all_correct=sum(bool(v) and all(v) for v in verdicts),
        groups_all_wrong=sum(bool(v) and not any(v) for v in verdicts),
        completion_tokens=sum(map(len, completions)),
        max_token_hit_rate=sum(c.finish_reason == "length" for c in completions) / len(completions),
        parts=_means_of_parts(groups),
    )


def _means_of_parts(groups: Sequence[Group]) -> dict[str, float | None]:
    values: dict[str, list[float]] = {}
    for name, value in (pair for group in groups for parts in group.parts_G for pair in parts):
        values.setdefault(name, []).extend([] if value is None else [value])
    return {name: sum(known) / len(known) if known else None for name, known in values.items()}


def step_metrics(
    *,
    step: int,
    condition: str,
    summary: RewardSummary,
    learned: dict[str, float | None],
    recent_correct: Sequence[float],
    **facts: Any,
) -> dict[str, Any]:
    """A line of metrics.jsonl. `learned` is empty where no group carried a gradient: those keys are null then.

    recent_correct: correct rates of the last RUNNING_STEPS steps, this one included. facts: the other keys.
    """
    return {
        "step": step,
        "condition": condition,
        **{key: learned.get(key) for key in FROM_LEARNER},
        "mean_reward": summary.mean_reward,
        "correct_rate": summary.correct_rate,
        "running_correct_rate": sum(recent_correct) / len(recent_correct) if recent_correct else None,
        **{f"reward_{name}": mean for name, mean in summary.parts.items()},
        "reward_errors": summary.reward_errors,
        "groups_all_correct": summary.groups_all_correct,
        "groups_all_wrong": summary.groups_all_wrong,
        "completion_tokens": summary.completion_tokens,
        "max_token_hit_rate": summary.max_token_hit_rate,
        **dict.fromkeys((*BACKPRESSURE, *JUDGE, *SERVICE)),
        **facts,
    }


def nonfinite_rows(
    step: int, groups: Sequence[Group], members: Sequence[tuple[int, int]], batch: Batch, learned: StepResult
) -> list[dict[str, Any]]:
    """Lines of nonfinite.jsonl: the completions for which a step was skipped, with all that went into the learner.

    members: (group, completion) of each rollout of `batch`. A sampler log-prob that is not finite is null.
    """
    rows = []
    for place in learned.culprits:
        (p, g), rollout = members[place], batch.rollouts[place]
        group = groups[p]
        rows.append(
            {
                "step": step,
                "not_finite": learned.skipped,
                "prompt_index": group.index,
                "completion_index": g,
                "prompt": group.example.prompt,
                "completion": group.completions[g].text,
                "reward": group.rewards_G[g],
                "advantage": rollout.advantage,
                "prompt_tokens": group.prompt_tokens.tolist(),
                "tokens": rollout.tokens_T.tolist(),
                "sampled": None if rollout.sampled_T is None else rollout.sampled_T.tolist(),
                "planning": rollout.planning_T.tolist(),
                "sampler_logprobs": [x if math.isfinite(x) else None for x in rollout.logprobs_T.tolist()],
            }
        )
    return rows


def generation_rows(
    step: int,
    groups: Sequence[Group],
    advantages_PG: Sequence[Sequence[float | None]],
    uncertainty: dict[tuple[int, int], tuple[float, float]],
) -> list[dict[str, Any]]:
    """Lines of generations.jsonl. `uncertainty`: (mean, max) by (group, completion) of those that were trained on."""
    rows = []
    for p, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            mean, peak = uncertainty.get((p, g), (None, None))
            rows.append(
                {
                    "step": step,
                    "prompt_index": group.index,
                    "prompt": group.example.prompt,
                    "completion": completion.text,
                    "reference": group.example.reference,
                    "reward": group.rewards_G[g],
                    "error": group.errors_G[g],
                    **({"reward_parts": dict(group.parts_G[g])} if any(group.parts_G) else {}),
                    "advantage": advantages_PG[p][g],
                    "num_tokens": len(completion),
                    "finish_reason": completion.finish_reason,
                    "uncertainty_mean": mean,
                    "uncertainty_max": peak,
                }
            )
    return rows
