"""Squeezing in a training (`[squeeze] at_steps, to_ranks`): begin at a high rank, go on at lower ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from retrain.backend import Backend
from retrain.training.checkpoint import TrainerState

if TYPE_CHECKING:
    from retrain.config import Config


def rank_after(config: Config, step: int) -> int:
    """Rank of the adapter when `step` steps are finished."""
    rank = config.model.lora_rank
    if config.squeeze is not None:
        for at, to in zip(config.squeeze.at_steps, config.squeeze.to_ranks, strict=True):
            rank = to if step >= at else rank
    return rank


def squeeze_if_due(config: Config, state: TrainerState, backend: Backend, say: Callable[[str], None]) -> dict[str, Any]:
    """After the step that has just finished; a squeezed adapter is another policy version. Figures for the metrics."""
    rank = rank_after(config, state.step)
    if rank == rank_after(config, state.step - 1):
        return {"lora_rank": rank, "squeeze_variance": None}
    from retrain.backend.local import LocalBackend

    assert isinstance(backend, LocalBackend)  # the config's checks see to it
    kept = backend.squeeze(rank)
    state.policy_version += 1
    mean, worst = sum(kept.values()) / len(kept), min(kept, key=lambda name: kept[name])
    say(
        f"step {state.step}: adapter squeezed to rank {rank}; it keeps {mean:.2%} of the variance on average, "
        f"{kept[worst]:.2%} in the worst layer ({worst})"
    )
    return {"lora_rank": rank, "squeeze_variance": mean}
