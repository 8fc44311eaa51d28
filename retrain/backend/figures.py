"""What a training step reports: figures made of the per-token records of its micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retrain.backend.packing import MicroBatch


@dataclass(frozen=True)
class Pass:
    """Per-token records of one micro-batch, detached and on the CPU: what a step's figures are made of.

    members, lengths: the rollouts, and how many tokens of each there are, one after another. planning_N: bool.
    entropy_N: None where the backend does not know it. gap_N: distance of the log-probs from the sampler's, in nats.
    """

    members: tuple[int, ...]
    lengths: tuple[int, ...]
    planning_N: Tensor
    entropy_N: Tensor | None
    uncertainty_N: Tensor
    advantages_N: Tensor
    gap_N: Tensor

    @classmethod
    def of(
        cls, micro: MicroBatch, entropy_N: Tensor | None, uncertainty_N: Tensor, advantages_N: Tensor, gap_N: Tensor
    ) -> Pass:
        tensors = (micro.planning_N, entropy_N, uncertainty_N, advantages_N, gap_N)
        return cls(micro.members, micro.lengths, *(None if t is None else t.detach().cpu() for t in tensors))  # pyright: ignore[reportArgumentType]

    def by_member(self, values_N: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(member, its values [T]) of each completion."""
        return zip(self.members, values_N.split(self.lengths), strict=True)


def logprob_gap(passes: Sequence[Pass]) -> dict[str, float]:
    """Distance of the trainer's log-probs from the sampler's, in nats."""
    gap = torch.cat([record.gap_N for record in passes])
    return {"logprob_gap_mean": gap.mean().item(), "logprob_gap_max": gap.max().item()}


def combined(updates: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Step metrics from the updates of a step: means over updates, ratios over all tokens.

    A backend may not know the norm of the gradient; the updates are then without it.
    """
    norms = [update["grad_norm"] for update in updates if "grad_norm" in update]
    tokens = sum(update["tokens"] for update in updates)
    return {
        "loss": sum(update["loss"] for update in updates) / len(updates),
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "ratio_mean": sum(update["ratio_sum"] for update in updates) / tokens,
        "clip_fraction": sum(update["clipped_sum"] for update in updates) / tokens,
        "ref_kl": sum(update["ref_kl_sum"] for update in updates) / tokens if "ref_kl_sum" in updates[0] else None,
    }


def uncertainty_summary(passes: Sequence[Pass]) -> tuple[tuple[float, float], ...]:
    """(mean, max) of each rollout's token uncertainty, in the order of the batch."""
    found = {}
    for record in passes:
        for member, values in record.by_member(record.uncertainty_N):
            found[member] = (values.mean().item(), values.max().item())
    return tuple(found[member] for member in sorted(found))


def credit_of_tokens(passes: Sequence[Pass]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(advantages, uncertainty) of each rollout's tokens, in the order of the batch."""
    found = {}
    for record in passes:
        credit = (record.by_member(values.float()) for values in (record.advantages_N, record.uncertainty_N))
        for (member, advantages), (_, uncertainty) in zip(*credit, strict=True):
            found[member] = (advantages.numpy(), uncertainty.numpy())
    return tuple(found[member] for member in sorted(found))


def token_statistics(passes: Sequence[Pass]) -> dict[str, float | None]:
    """Entropy of all, of execution and of planning tokens; None where there is no such token, or it is not known.

    Variances: population.
    """
    entropies = [record.entropy_N for record in passes if record.entropy_N is not None]
    entropy = torch.cat(entropies).double() if entropies else None
    uncertainty = torch.cat([record.uncertainty_N for record in passes]).double()
    planning = torch.cat([record.planning_N for record in passes])

    def moments(values: Tensor | None, mask: Tensor | None = None) -> tuple[float | None, float | None]:
        chosen = values[mask] if values is not None and mask is not None else values
        if chosen is None or not len(chosen):
            return None, None
        return chosen.mean().item(), chosen.var(correction=0).item()

    execution, plan = moments(entropy, ~planning), moments(entropy, planning)
    return {
        "entropy_mean": moments(entropy)[0],
        "exec_entropy_mean": execution[0],
        "exec_entropy_var": execution[1],
        "plan_entropy_mean": plan[0],
        "plan_entropy_var": plan[1],
        "planning_fraction": planning.double().mean().item(),
        "exec_uncertainty_var": moments(uncertainty[~planning])[1],
    }
