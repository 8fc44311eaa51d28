"""One optimizer update: token credit before it is sent, figures from the log-probs that come back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from retrain.algorithm.transform import token_credit
from retrain.algorithm.uncertainty import token_uncertainty
from retrain.backend.figures import Pass, logprob_gap
from retrain.backend.packing import MicroBatch, loss_denominator, pack
from retrain.backend.tinker.datums import Datum, datums, folded
from retrain.config.service import Reduction
from retrain.types import Batch, RetrainError
from retrain_kernels import policy_loss

if TYPE_CHECKING:
    from retrain.config import Config

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Update:
    """datums: what is sent. micros: the same rollouts packed, in the same order; uncertainty, advantages: of each
    one's tokens, as `Pass` has them. denominator: of the loss."""

    datums: list[Datum]
    micros: list[MicroBatch]
    uncertainty: list[Tensor]
    advantages: list[Tensor]
    denominator: float


def prepare(batch: Batch, members: Sequence[int], config: Config, *, uncertainty: str, reduction: Reduction) -> Update:
    """Credit the tokens of the rollouts `members` by the sampler's log-probs, and fold the loss's mean into it.

    uncertainty: "surprisal" or "variance". reduction: what the service makes of its token losses.
    """
    aggregation = config.loss.aggregation
    denominator = loss_denominator(
        [batch.rollouts[i] for i in members], aggregation=aggregation, max_tokens=config.training.max_tokens
    )
    micros = pack(batch, members, budget=sys.maxsize, share_prompts=False, pad_id=0, device=CPU)
    sent, uncertainties, advantages = [], [], []
    for micro in micros:
        uncertainty_N = token_uncertainty(uncertainty, micro.sampler_logprob_N)
        advantages_N = token_credit(
            micro.advantages_B,
            uncertainty_N,
            micro.planning_N,
            micro.cu_seqlens,
            transform_mode=config.algorithm.transform_mode,
            gtpo_beta=config.gtpo.beta,
            hicra_alpha=config.hicra.alpha,
            sepa_lambda=batch.sepa_lambda,
        )
        weighted_N = folded(
            advantages_N,
            micro.cu_seqlens,
            aggregation=aggregation,
            denominator=denominator,
            reduction=reduction,
            count=len(members),
        )
        sent += datums(batch, micro, weighted_N)
        uncertainties.append(uncertainty_N)
        advantages.append(advantages_N)
    return Update(sent, micros, uncertainties, advantages, denominator)


def measured(update: Update, logprobs: Sequence[np.ndarray], config: Config) -> tuple[dict[str, float], list[Pass]]:
    """Loss and sums as `policy_loss` names them, and per-token records; logprobs: the service's, [S - 1] a datum.

    The loss is that of the config, from the log-probs that the service computed. Raises RetrainError where they are
    not finite.
    """
    trained = [values[datum.weights > 0] for values, datum in zip(logprobs, update.datums, strict=True)]
    sums: dict[str, float] = {}
    records, start = [], 0
    for micro, uncertainty_N, advantages_N in zip(update.micros, update.uncertainty, update.advantages, strict=True):
        end = start + len(micro.members)
        logprob_N = torch.from_numpy(np.concatenate(trained[start:end]).astype(np.float32))
        start = end
        if not logprob_N.isfinite().all():
            raise RetrainError(
                "the service's log-probabilities are not finite: the adapter has diverged. Go back to an earlier "
                "checkpoint, with a lower training.lr"
            )
        loss, metrics = policy_loss(
            logprob_N,
            micro.sampler_logprob_N,
            advantages_N,
            micro.cu_seqlens,
            kind=config.loss.kind,
            clip_low=config.loss.clip_low,
            clip_high=config.loss.clip_high,
            aggregation=config.loss.aggregation,
            denominator=update.denominator,
        )
        for key, value in ({"loss": loss} | metrics).items():
            sums[key] = sums.get(key, 0.0) + value.item()
        gap_N = (logprob_N - micro.sampler_logprob_N).abs()
        records.append(Pass.of(micro, None, uncertainty_N, advantages_N, gap_N))
    return sums, records


def check_gap(records: Sequence[Pass], limit: float) -> None:
    """Raise RetrainError where sampler and trainer disagree by more than `limit` nats (0: never)."""
    worst = logprob_gap(records)["logprob_gap_max"]
    if 0 < limit < worst:
        raise RetrainError(
            f"the service's sampler and trainer disagree by {worst:.3g} nats on a token, more than "
            f"inference.max_logprob_gap = {limit:g}: the completions were not sampled from the policy that trains"
        )
