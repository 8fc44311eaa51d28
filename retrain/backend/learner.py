"""One optimizer step on a batch of rollouts: forward to hidden states, log-prob and entropy in one pass, token-level
credit from that same pass, policy loss, backward. It knows no algorithm by name: those live in `retrain.algorithm`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from retrain.algorithm.mismatch import mismatch_weights
from retrain.algorithm.schedule import learning_rate
from retrain.algorithm.transform import token_credit
from retrain.algorithm.uncertainty import resolve, token_uncertainty
from retrain.backend.model import Policy
from retrain.backend.packing import MicroBatch, pack
from retrain.types import Batch, RetrainError, Rollout, StepResult
from retrain_kernels import linear_logprob, policy_loss

if TYPE_CHECKING:
    from retrain.config import Config


@dataclass(frozen=True)
class _Pass:
    """Per-token records of one micro-batch, detached: what the step's statistics are made of."""

    micro: MicroBatch
    entropy_N: Tensor
    uncertainty_N: Tensor
    gap_N: Tensor


class Learner:
    """Holds the optimizer of the adapter; everything else of a step is in its arguments."""

    def __init__(self, policy: Policy, config: Config) -> None:
        self.policy = policy
        self.algorithm, self.loss, self.training = config.algorithm, config.loss, config.training
        self.inference, self.gtpo, self.hicra = config.inference, config.gtpo, config.hicra
        self.uncertainty = resolve(config.algorithm.uncertainty, has_entropy=True)
        self.parameters = policy.adapter_parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.training.lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.eps,
            weight_decay=config.training.weight_decay,
        )
        self.share_prompts = can_share_prompts(policy)

    def step(self, batch: Batch, step: int) -> StepResult:
        """Update the adapter on `batch`; `step` counts from 0 and sets the learning rate.

        Raises RetrainError when the log-prob gap exceeds `max_logprob_gap` or the gradient is not finite; the
        adapter is then as it was before the update at fault.
        """
        rate = learning_rate(
            step,
            base=self.training.lr,
            schedule=self.training.lr_schedule,
            warmup_steps=self.training.warmup_steps,
            max_steps=self.training.max_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        old = self._recomputed(batch)
        updates: list[dict[str, float]] = []
        passes: list[_Pass] = []
        sampled_from: list[_Pass] = []
        for epoch in range(self.loss.epochs):
            for part in range(self.loss.minibatches):
                members = range(part, len(batch.rollouts), self.loss.minibatches)
                if not members:
                    continue
                update, records = self._update(batch, members, old, first=not updates)
                # The gap to the sampler and the entropies are the sampling policy's: later updates have moved on.
                sampled_from = sampled_from or records
                passes += records if epoch == 0 else []
                updates.append(update)
        metrics = {"lr": rate} | _combine(updates) | _gap(sampled_from) | _token_statistics(passes)
        return StepResult(metrics, _uncertainty_summary(passes))

    def _update(
        self, batch: Batch, members: Sequence[int], old: dict[int, Tensor] | None, *, first: bool
    ) -> tuple[dict[str, float], list[_Pass]]:
        """One optimizer update on the rollouts `members`, over as many micro-batches as the token budget asks for."""
        rollouts = [batch.rollouts[i] for i in members]
        denominator = self._denominator(rollouts)
        self.policy.peft.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        records = []
        for micro in self._pack(batch, members):
            loss, metrics, record = self._forward(micro, batch.sepa_lambda, denominator, old)
            loss.backward()
            records.append(record)
            for key, value in ({"loss": loss.detach()} | metrics).items():
                sums[key] = sums[key] + value if key in sums else value
        self.policy.peft.eval()
        if first:
            self._check_gap(records)
        limit = self.training.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit if limit > 0 else math.inf).item()
        if not math.isfinite(norm):
            raise RetrainError(
                "the gradient is not finite; no update was made. Lower training.lr or loss.clip_high, or train in fp32"
            )
        self.optimizer.step()
        return {key: value.item() for key, value in sums.items()} | {"grad_norm": norm}, records

    def _forward(
        self, micro: MicroBatch, sepa_lambda: float, denominator: float, old: dict[int, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor], _Pass]:
        logprob_N, entropy_N = self._logprob(micro)
        uncertainty_N = token_uncertainty(self.uncertainty, logprob_N.detach(), entropy_N.detach())
        advantages_N = token_credit(
            micro.advantages_B,
            uncertainty_N,
            micro.planning_N,
            micro.cu_seqlens,
            transform_mode=self.algorithm.transform_mode,
            gtpo_beta=self.gtpo.beta,
            hicra_alpha=self.hicra.alpha,
            sepa_lambda=sepa_lambda,
        )
        sampler_N, weights_N = micro.sampler_logprob_N, None
        old_N = sampler_N
        if self.loss.old_logprobs == "recompute":
            # On the first and only pass the old policy *is* this one: no second forward is needed to know it.
            old_N = torch.cat([old[i] for i in micro.members]) if old is not None else logprob_N.detach()
            weights_N = mismatch_weights(
                old_N, sampler_N, micro.cu_seqlens, kind=self.loss.mismatch_correction, cap=self.loss.mismatch_cap
            )
        loss, metrics = policy_loss(
            logprob_N,
            old_N,
            advantages_N,
            micro.cu_seqlens,
            kind=self.loss.kind,
            clip_low=self.loss.clip_low,
            clip_high=self.loss.clip_high,
            aggregation=self.loss.aggregation,
            denominator=denominator,
            ref_logprob=self._reference(micro) if self.loss.kl_coef else None,
            kl_coef=self.loss.kl_coef,
            kl_estimator=self.loss.kl_estimator,
            dual_clip=self.loss.dual_clip,
            entropy=entropy_N if self.loss.entropy_coef else None,
            entropy_coef=self.loss.entropy_coef,
            weights=weights_N,
        )
        gap_N = (logprob_N.detach() - sampler_N).abs()
        return loss, metrics, _Pass(micro, entropy_N.detach(), uncertainty_N, gap_N)

    def _logprob(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N] at the sampling temperature, without a logit kept."""
        positions = None if micro.mask is None else micro.positions_RS
        hidden_RSD = self.policy.hidden(micro.tokens_RS, positions, micro.mask)
        hidden_ND = hidden_RSD.flatten(0, 1).index_select(0, micro.predictor_N)
        head = self.policy.head
        logprob_N, entropy_N = linear_logprob(
            hidden_ND,
            head.weight,
            micro.targets_N,
            bias=head.bias,
            temperature=self.training.temperature,
            entropy_grad=self.loss.entropy_coef != 0,
        )
        if not (logprob_N.isfinite() & entropy_N.isfinite()).all():
            raise RetrainError(
                "the model's log-probabilities are not finite: the adapter has diverged, or the number format is too "
                "narrow. Go back to an earlier checkpoint, with a lower training.lr or in fp32"
            )
        return logprob_N, entropy_N

    @torch.no_grad()
    def _reference(self, micro: MicroBatch) -> Tensor:
        """Log-probs [N] under the frozen base: the same model with its adapter off."""
        with self.policy.peft.disable_adapter():
            return self._logprob(micro)[0]

    @torch.no_grad()
    def _recomputed(self, batch: Batch) -> dict[int, Tensor] | None:
        """Each rollout's log-probs under the policy as it is now, where several updates will move away from it."""
        if self.loss.old_logprobs != "recompute" or self.loss.epochs * self.loss.minibatches == 1:
            return None
        old = {}
        for micro in self._pack(batch, range(len(batch.rollouts))):
            lengths = (micro.cu_seqlens[1:] - micro.cu_seqlens[:-1]).tolist()
            old |= zip(micro.members, self._logprob(micro)[0].split(lengths), strict=True)
        return old

    def _pack(self, batch: Batch, members: Sequence[int]) -> list[MicroBatch]:
        return pack(
            batch,
            members,
            budget=self.training.micro_batch_tokens,
            share_prompts=self.share_prompts,
            pad_id=self.policy.eos_ids[0],
            device=self.policy.device,
        )

    def _denominator(self, rollouts: Sequence[Rollout]) -> float:
        """What the loss of the whole optimizer update is divided by, whatever micro-batches it is computed in."""
        if self.loss.aggregation == "token_mean":
            return sum(map(len, rollouts))
        return len(rollouts) * (self.training.max_tokens if self.loss.aggregation == "constant" else 1)

    def _check_gap(self, records: Sequence[_Pass]) -> None:
        limit, worst = self.inference.max_logprob_gap, _gap(records)["logprob_gap_max"]
        if 0 < limit < worst:
            raise RetrainError(
                f"sampler and trainer disagree by {worst:.3g} nats on a token, more than inference.max_logprob_gap = "
                f"{limit:g}: the completions were not sampled from the policy that trains"
            )


@torch.no_grad()
def can_share_prompts(policy: Policy) -> bool:
    """Whether this model computes a shared row as it computes separate sequences; decided by trying it once.

    Windowed and recurrent layers are left out beforehand: on a short probe they look the same.
    """
    config = policy.lm.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if any(kind != "full_attention" for kind in kinds) or getattr(config, "sliding_window", None):
        return False
    ids = np.arange(12) % config.vocab_size
    probe = Batch(
        prompts=(ids[:4],),
        rollouts=tuple(Rollout(0, part, np.zeros(4), 0.0, np.zeros(4, dtype=bool)) for part in (ids[4:8], ids[8:])),
    )

    def hidden(share: bool) -> Tensor:
        micros = pack(probe, (0, 1), budget=64, share_prompts=share, pad_id=0, device=policy.device)
        assert len(micros) == 1
        positions = micros[0].positions_RS if share else None
        states = policy.hidden(micros[0].tokens_RS, positions, micros[0].mask).flatten(0, 1)
        return states.index_select(0, micros[0].predictor_N).float()

    shared, separate = hidden(True), hidden(False)
    tolerance = 1e-3 if policy.head.weight.dtype == torch.float32 else 5e-2
    return bool((shared - separate).norm() <= tolerance * separate.norm())


def _gap(passes: Sequence[_Pass]) -> dict[str, float]:
    """Distance of the trainer's log-probs from the sampler's, in nats."""
    gap = torch.cat([record.gap_N for record in passes])
    return {"logprob_gap_mean": gap.mean().item(), "logprob_gap_max": gap.max().item()}


def _combine(updates: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Step metrics from the updates of a step: means over updates, ratios over all tokens."""
    tokens = sum(update["tokens"] for update in updates)
    return {
        "loss": sum(update["loss"] for update in updates) / len(updates),
        "grad_norm": sum(update["grad_norm"] for update in updates) / len(updates),
        "ratio_mean": sum(update["ratio_sum"] for update in updates) / tokens,
        "clip_fraction": sum(update["clipped_sum"] for update in updates) / tokens,
        "ref_kl": sum(update["ref_kl_sum"] for update in updates) / tokens if "ref_kl_sum" in updates[0] else None,
    }


def _uncertainty_summary(passes: Sequence[_Pass]) -> tuple[tuple[float, float], ...]:
    """(mean, max) of each rollout's token uncertainty, in the order of the batch."""
    found = {}
    for record in passes:
        lengths = (record.micro.cu_seqlens[1:] - record.micro.cu_seqlens[:-1]).tolist()
        for member, values in zip(record.micro.members, record.uncertainty_N.cpu().split(lengths), strict=True):
            found[member] = (values.mean().item(), values.max().item())
    return tuple(found[member] for member in sorted(found))


def _token_statistics(passes: Sequence[_Pass]) -> dict[str, float | None]:
    """Entropy of all, of execution and of planning tokens; None where there is no such token. Variances: population."""
    entropy = torch.cat([record.entropy_N for record in passes]).cpu().double()
    uncertainty = torch.cat([record.uncertainty_N for record in passes]).cpu().double()
    planning = torch.cat([record.micro.planning_N for record in passes]).cpu()

    def moments(values: Tensor) -> tuple[float | None, float | None]:
        return (values.mean().item(), values.var(correction=0).item()) if len(values) else (None, None)

    execution, plan = moments(entropy[~planning]), moments(entropy[planning])
    return {
        "entropy_mean": moments(entropy)[0],
        "exec_entropy_mean": execution[0],
        "exec_entropy_var": execution[1],
        "plan_entropy_mean": plan[0],
        "plan_entropy_var": plan[1],
        "planning_fraction": planning.double().mean().item(),
        "exec_uncertainty_var": moments(uncertainty[~planning])[1],
    }
