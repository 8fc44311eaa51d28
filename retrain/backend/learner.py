"""One optimizer step on a batch of rollouts: forward to hidden states, log-prob and entropy in one pass, token-level
credit from that same pass, policy loss, backward. It knows no algorithm by name: those live in `retrain.algorithm`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from retrain.algorithm.mismatch import mismatch_weights
from retrain.algorithm.schedule import learning_rate
from retrain.algorithm.transform import token_credit
from retrain.algorithm.uncertainty import resolve, token_uncertainty
from retrain.backend.figures import (
    Pass,
    combined,
    credit_of_tokens,
    logprob_gap,
    token_statistics,
    uncertainty_summary,
)
from retrain.backend.model import Policy
from retrain.backend.packing import MicroBatch, can_share_prompts, loss_denominator, pack, trained
from retrain.backend.recovery import NotFinite, OutOfMemory, all_or_nothing, fitting, release_memory
from retrain.backend.sharing import shares
from retrain.distributed import ALONE, World
from retrain.types import Batch, RetrainError, StepResult
from retrain_kernels import linear_logprob, policy_loss

if TYPE_CHECKING:
    from retrain.config import Config


@dataclass(frozen=True)
class _Part:
    """What a rank's rollouts add to an update. sums: of the loss, as `policy_loss` names them.

    broken: rollouts whose log-probs are not finite. moved: whether a parameter has a gradient, for each of them.
    """

    sums: dict[str, float]
    records: list[Pass]
    broken: list[int]
    moved: tuple[bool, ...]


class Learner:
    """Holds the optimizer of the adapter; everything else of a step is in its arguments.

    Of several ranks, each trains on its share of the groups. Loss, gradient and figures are those of the whole batch on
    all of them, so that their adapters stay the same.
    """

    def __init__(self, policy: Policy, config: Config, world: World = ALONE) -> None:
        self.policy, self.world = policy, world
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

        A step in which a log-probability, the loss or the gradient is not finite is taken back whole, all updates of
        it: `skipped` says what was not finite. Where memory runs out, the step is done again from its beginning with
        half of the tokens that were together, and `training.micro_batch_tokens` stays at that.
        Raises RetrainError when the log-prob gap exceeds `max_logprob_gap`, and where one sequence alone does not fit.
        Whatever it raises, adapter and optimizer are as they were before.
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
        updates = self.loss.epochs * self.loss.minibatches
        while True:
            try:
                with all_or_nothing(self.parameters, self.optimizer, updates=updates):
                    _check_sampler(batch)
                    result = self._attempt(batch)
                break
            except NotFinite as error:
                result = StepResult(skipped=error.what, culprits=error.culprits)
                break
            except OutOfMemory as error:
                self.training = self.training.model_copy(update={"micro_batch_tokens": self._fewer_tokens(error)})
            # Not before the exception is gone: it holds the tensors of the attempt.
            release_memory()
        facts = {"lr": rate, "micro_batch_tokens": self.training.micro_batch_tokens}
        return dataclasses.replace(result, metrics=facts | result.metrics)

    def _attempt(self, batch: Batch) -> StepResult:
        """The updates of a step. Raises NotFinite and OutOfMemory."""
        own = shares(batch, self.world.size, share_prompts=self.share_prompts)[self.world.rank]
        old = self._recomputed(batch, own)
        updates: list[dict[str, float]] = []
        passes: list[Pass] = []
        sampled_from: list[Pass] = []
        for epoch in range(self.loss.epochs):
            for part in range(self.loss.minibatches):
                members = range(part, len(batch.rollouts), self.loss.minibatches)
                if not members:
                    continue
                update, records = self._update(batch, members, own, old, first=not updates)
                # The gap to the sampler and the entropies are the sampling policy's: later updates have moved on.
                sampled_from = sampled_from or records
                passes += records if epoch == 0 else []
                updates.append(update)
        metrics = combined(updates) | logprob_gap(sampled_from) | token_statistics(passes)
        return StepResult(metrics, uncertainty_summary(passes), credit_of_tokens(passes))

    def _update(
        self,
        batch: Batch,
        members: Sequence[int],
        own: Collection[int],
        old: dict[int, Tensor] | None,
        *,
        first: bool,
    ) -> tuple[dict[str, float], list[Pass]]:
        """One optimizer update on the rollouts `members`, over as many micro-batches as the token budget asks for.

        own: the rollouts of this rank.
        """
        denominator = loss_denominator(
            [batch.rollouts[i] for i in members],
            aggregation=self.loss.aggregation,
            max_tokens=self.training.max_tokens,
        )
        mine = [i for i in members if i in own]
        parts = self.world.each(lambda: self._gradient(batch, mine, old, denominator))
        _check_finite(i for part in parts for i in part.broken)
        records = [record for part in parts for record in part.records]
        if first:
            self._check_gap(records)
        self._sum_gradients(parts)
        norm = self._clip(self.training.max_grad_norm or math.inf)
        update = _summed(parts) | {"grad_norm": norm}
        for what, value in (("loss", update["loss"]), ("gradient", norm)):
            if not math.isfinite(value):
                raise NotFinite(what, self._culprits(batch, mine, old, denominator) or members)
        self.optimizer.step()
        return update, records

    def _gradient(
        self, batch: Batch, members: Sequence[int], old: dict[int, Tensor] | None, denominator: float
    ) -> _Part:
        """Leave the gradient of the loss over `members` in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        records: list[Pass] = []
        broken: list[int] = []
        self.policy.peft.train()
        try:
            for micro in self._lockstep(self._pack(batch, members)):
                if micro is None:
                    self._idle()
                    continue
                with self._pass(micro):
                    logprobs = self._logprob(micro)
                    reference_N = self._reference(micro) if self.loss.kl_coef else None
                    if found := _broken(micro, *logprobs, reference_N):
                        broken += found
                        # Of no use, but where the base is sharded every pass is everybody's.
                        logprobs[0].sum().backward()
                        continue
                    loss, metrics, record = self._loss(
                        micro, *logprobs, reference_N, batch.sepa_lambda, denominator, old
                    )
                    loss.backward()
                records.append(record)
                for key, value in ({"loss": loss.detach()} | metrics).items():
                    sums[key] = sums[key] + value if key in sums else value
        finally:
            self.policy.peft.eval()
        moved = tuple(parameter.grad is not None for parameter in self.parameters)
        return _Part({key: value.item() for key, value in sums.items()}, records, broken, moved)

    def _sum_gradients(self, parts: Sequence[_Part]) -> None:
        """Over the ranks, in one go. A parameter that no rank has a gradient of is left without."""
        if len(parts) == 1:
            return
        gradients = []
        for parameter, moved in zip(self.parameters, zip(*(part.moved for part in parts), strict=True), strict=True):
            if any(moved):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        self.world.sum_(gradients)

    def _culprits(
        self, batch: Batch, members: Sequence[int], old: dict[int, Tensor] | None, denominator: float
    ) -> list[int]:
        """Those whose own loss or gradient is not finite, of all ranks' `members`; none where only the sum is not, or
        where the base is sharded."""

        if self.policy.is_sharded:
            return []  # one rank alone cannot look

        def look() -> list[int]:
            found = []
            for i in members:
                loss = self._gradient(batch, [i], old, denominator).sums.get("loss", math.nan)
                if not (math.isfinite(loss) and math.isfinite(self._clip(math.inf))):
                    found.append(i)
            return found

        return [i for found in self.world.each(look) for i in found]

    def _clip(self, limit: float) -> float:
        """Cut the gradient to the norm `limit`; the norm it had."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit).item()

    def _loss(
        self,
        micro: MicroBatch,
        logprob_N: Tensor,
        entropy_N: Tensor,
        reference_N: Tensor | None,
        sepa_lambda: float,
        denominator: float,
        old: dict[int, Tensor] | None,
    ) -> tuple[Tensor, dict[str, Tensor], Pass]:
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
            ref_logprob=reference_N,
            kl_coef=self.loss.kl_coef,
            kl_estimator=self.loss.kl_estimator,
            dual_clip=self.loss.dual_clip,
            entropy=entropy_N if self.loss.entropy_coef else None,
            entropy_coef=self.loss.entropy_coef,
            weights=weights_N,
        )
        gap_N = (logprob_N.detach() - sampler_N).abs()
        return loss, metrics, Pass.of(micro, entropy_N, uncertainty_N, advantages_N, gap_N)

    def _logprob(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N] at the sampling temperature, without a logit kept."""
        positions = None if micro.mask is None else micro.positions_RS
        hidden_RSD = self.policy.hidden(micro.tokens_RS, positions, micro.mask)
        hidden_ND = hidden_RSD.flatten(0, 1).index_select(0, micro.predictor_N)
        head = self.policy.head
        return linear_logprob(
            hidden_ND,
            head.weight,
            micro.targets_N,
            bias=head.bias,
            temperature=self.training.temperature,
            entropy_grad=self.loss.entropy_coef != 0,
        )

    @torch.no_grad()
    def _reference(self, micro: MicroBatch) -> Tensor:
        """Log-probs [N] under the frozen base: the same model with its adapter off."""
        with self.policy.peft.disable_adapter():
            return self._logprob(micro)[0]

    @torch.no_grad()
    def _recomputed(self, batch: Batch, own: Collection[int]) -> dict[int, Tensor] | None:
        """Log-probs of each of the rollouts `own` under the policy as it is now, where several updates will move away
        from it."""
        if self.loss.old_logprobs != "recompute" or self.loss.epochs * self.loss.minibatches == 1:
            return None
        old: dict[int, Tensor] = {}

        def recompute() -> list[int]:
            for micro in self._lockstep(self._pack(batch, sorted(own))):
                if micro is None:
                    self._idle(backward=False)
                    continue
                with self._pass(micro):
                    old.update(micro.by_member(self._logprob(micro)[0]))
            return [i for i in old if not old[i].isfinite().all()]

        _check_finite(i for broken in self.world.each(recompute) for i in broken)
        return old

    def _lockstep(self, micros: list[MicroBatch]) -> list[MicroBatch | None]:
        """With None where other ranks have more passes to make: where the base is sharded, all make as many."""
        if not self.policy.is_sharded:
            return list(micros)
        most = max(self.policy.together.gather(len(micros)))
        return [*micros, *[None] * (most - len(micros))]

    @contextmanager
    def _pass(self, micro: MicroBatch) -> Iterator[None]:
        """Around the passes over a micro-batch. Raises OutOfMemory."""
        with self.policy.together.lockstep(), fitting(tokens=micro.tokens_RS.numel(), sequences=len(micro.members)):
            yield

    def _idle(self, *, backward: bool = True) -> None:
        """The passes over a micro-batch, over one token and to no gradient."""
        token = torch.full((1, 1), self.policy.eos_ids[0], device=self.policy.device)
        with self.policy.together.lockstep():
            hidden = self.policy.hidden(token)
            if backward and self.loss.kl_coef:
                with torch.no_grad(), self.policy.peft.disable_adapter():
                    self.policy.hidden(token)
            if backward:
                (hidden.sum() * 0).backward()

    def _pack(self, batch: Batch, members: Sequence[int]) -> list[MicroBatch]:
        budget = self.training.micro_batch_tokens
        with fitting(tokens=budget, sequences=len(members)):
            return pack(
                batch,
                members,
                budget=budget,
                share_prompts=self.share_prompts,
                pad_id=self.policy.eos_ids[0],
                device=self.policy.device,
            )

    def _fewer_tokens(self, error: OutOfMemory) -> int:
        """The budget to go on with: half of what was together, which is less than the budget where a batch is small."""
        budget = self.training.micro_batch_tokens
        if error.sequences == 1 or budget == 1:
            raise RetrainError(
                f"out of memory in training: one sequence of {error.tokens} tokens does not fit by itself. Lower "
                f"training.max_tokens (now {self.training.max_tokens}) or max_prompt_tokens, set "
                "training.gradient_checkpointing = true, or take a device with more memory"
            ) from error
        return max(1, min(budget, error.tokens) // 2)

    def _check_gap(self, records: Sequence[Pass]) -> None:
        limit, worst = self.inference.max_logprob_gap, logprob_gap(records)["logprob_gap_max"]
        if 0 < limit < worst:
            ahead = self.training.max_staleness
            why = (
                f"training.max_staleness = {ahead} lets the policy get that far ahead of its samples"
                if ahead
                else "the completions were not sampled from the policy that trains"
            )
            raise RetrainError(
                f"sampler and trainer disagree by {worst:.3g} nats on a token, more than inference.max_logprob_gap = "
                f"{limit:g}: {why}"
            )


def _summed(parts: Sequence[_Part]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part.sums)
    return {name: sum(part.sums.get(name, 0.0) for part in parts) for name in names}


def _broken(micro: MicroBatch, *values_N: Tensor | None) -> list[int]:
    """Rollouts of which one of the values is not finite."""
    finite_N = torch.stack([values.detach().isfinite() for values in values_N if values is not None]).all(0)
    return [] if finite_N.all() else [member for member, own in micro.by_member(finite_N) if not own.all()]


def _check_finite(broken: Iterable[int]) -> None:
    found = list(broken)
    if found:
        raise NotFinite("log-probabilities", found)


def _check_sampler(batch: Batch) -> None:
    bad = [i for i, r in enumerate(batch.rollouts) if not np.isfinite(trained(r, r.logprobs_T)).all()]
    if bad:
        raise NotFinite("sampler's log-probabilities", bad)
