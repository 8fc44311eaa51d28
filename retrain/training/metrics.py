"""One object per finished step: the keys of metrics.jsonl, all of them from the first step on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retrain.types import Group

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
)
BACKPRESSURE = ("bp_action", "bp_regime", "bp_p_star", "bp_sigma", "bp_kappa", "bp_throughput")
JUDGE = tuple(f"judge_{figure}" for figure in ("requests", "cached", "prompt_tokens", "completion_tokens", "latency_s"))
# Of a step, timed: `<stage>_time_s`.
STAGES = ("sample", "reward", "train", "sync")
# What may differ between two runs that are otherwise equal bit for bit.
MEASURED = (*(f"{stage}_time_s" for stage in STAGES), "step_time_s", "tokens_per_s", "peak_memory_bytes", *JUDGE)


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
        **dict.fromkeys((*BACKPRESSURE, *JUDGE)),
        **facts,
    }


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
