"""What a line of metrics.jsonl is called at wandb and TensorBoard."""

from __future__ import annotations

from typing import Any

REWARDS = ("mean_reward", "correct_rate", "running_correct_rate", "groups_all_correct", "groups_all_wrong")


def tracked_name(key: str) -> str:
    """`train/` and the key; rewards, entropies and backpressure have a group each, which the key need not repeat."""
    if key in REWARDS:
        return f"train/rewards/{key}"
    if key.startswith("reward_") and key != "reward_time_s":
        return f"train/rewards/{key.removeprefix('reward_')}"
    if key.startswith("bp_"):
        return f"train/backpressure/{key.removeprefix('bp_')}"
    if "entropy_" in key:
        return f"train/entropy/{key.replace('entropy_', '')}"
    return f"train/{key}"


def figures(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of a step by their names there: truth as 0 and 1, without what is null."""
    return {
        tracked_name(key): int(value) if isinstance(value, bool) else value
        for key, value in metrics.items()
        if isinstance(value, int | float)
    }


def words(metrics: dict[str, Any]) -> dict[str, str]:
    """What a step says in words, as in `bp_action`."""
    return {tracked_name(key): value for key, value in metrics.items() if isinstance(value, str)}
