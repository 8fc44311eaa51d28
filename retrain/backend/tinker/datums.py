"""What a service is sent of an update: sequences with their targets, sampler log-probs and advantages of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retrain.backend.packing import MicroBatch
from retrain.config.service import Reduction
from retrain.types import Batch


@dataclass(frozen=True)
class Datum:
    """One rollout of S tokens as the service takes it, all [S - 1]: position t predicts token t + 1.

    inputs, targets: int64. logprobs, advantages, weights: float32, 0 where the target is not trained on; the weights
    are 1 elsewhere.
    """

    inputs: np.ndarray
    targets: np.ndarray
    logprobs: np.ndarray
    advantages: np.ndarray
    weights: np.ndarray


def datums(batch: Batch, micro: MicroBatch, advantages_N: Tensor) -> list[Datum]:
    """The rollouts of `micro`, in its order; advantages_N: one for each of its N trained tokens."""
    ends = micro.cu_seqlens[1:-1].numpy()
    parts = np.split(advantages_N.float().numpy(), ends)
    return [_sequence(batch, member, part) for member, part in zip(micro.members, parts, strict=True)]


def _sequence(batch: Batch, member: int, advantages: np.ndarray) -> Datum:
    rollout = batch.rollouts[member]
    prompt = batch.prompts[rollout.group]
    tokens = np.concatenate((prompt, rollout.tokens_T)).astype(np.int64)
    sampled = np.ones(len(rollout.tokens_T), dtype=bool) if rollout.sampled_T is None else rollout.sampled_T
    trained = np.concatenate((np.zeros(len(prompt) - 1, dtype=bool), sampled))
    logprobs, credit = (np.zeros(len(trained), dtype=np.float32) for _ in range(2))
    logprobs[trained] = rollout.logprobs_T[sampled]
    credit[trained] = advantages
    return Datum(tokens[:-1], tokens[1:], logprobs, credit, trained.astype(np.float32))


def folded(
    advantages_N: Tensor, cu_seqlens: Tensor, *, aggregation: str, denominator: float, reduction: Reduction, count: int
) -> Tensor:
    """Advantages [N] under which the service's reduction of the token losses is the loss of this project.

    Each of the losses (importance_sampling, ppo, cispo) is positively homogeneous in the advantage, so the weight that
    a token's loss has in the mean goes into its advantage, over the weight that the service gives it.
    aggregation, denominator: as of `policy_loss`. count: sequences of the whole update, which "sequence_mean" divides
    by.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    length_N = torch.repeat_interleave(lengths, lengths).to(torch.float64)
    weight_N = torch.full_like(length_N, 1.0 / denominator)
    if aggregation == "seq_mean":
        weight_N /= length_N
    if reduction == "sequence_mean":
        weight_N *= length_N * count
    return (advantages_N.double() * weight_N).float()
