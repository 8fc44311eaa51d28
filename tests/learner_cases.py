"""Drawn by hypothesis: an algorithm, a scored batch and a learner for both; and what the formulas say of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
import tiny_models as models
from retrain.backend.learner import Learner
from retrain.config import Config
from retrain.training.batching import credit
from retrain.types import Batch, Completion, Example, Group

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
LONGER = 50


def cases(count: int) -> settings:
    """So many examples, and LONGER times as many in the long profile (`make torture`)."""
    return settings(
        max_examples=count * (LONGER if LONG else 1), deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


@dataclass(frozen=True)
class Case:
    """overrides: of the config. lengths: of a prompt and its completions, by group. rewards_PG: of these.

    masked: share of a completion's tokens that an environment wrote. noise: of the sampler's log-probs, in nats.
    """

    overrides: dict[str, object]
    lengths: tuple[tuple[int, tuple[int, ...]], ...]
    rewards_PG: tuple[tuple[float, ...], ...]
    sepa_lambda: float
    masked: float
    noise: float
    seed: int

    def config(self, kind: str) -> Config:
        return models.config_for(kind, training__lr=0.0, training__max_grad_norm=0.0, **self.overrides)

    @property
    def tolerance(self) -> float:
        """Relative: token-level credit is float32, and so are the weights of a mismatch; the rest is float64."""
        plain = self.overrides["algorithm__transform_mode"] == "none"
        return 1e-9 if plain and self.overrides.get("loss__mismatch_correction", "none") == "none" else 2e-6


@st.composite
def losses(draw) -> dict[str, object]:
    kind = draw(st.sampled_from(["importance_sampling", "ppo", "cispo", "gspo"]))
    low, high = draw(st.sampled_from([(0.2, 0.28), (0.02, 0.05)]))
    chosen: dict[str, object] = {
        "loss__kind": kind,
        "loss__clip_low": low,
        "loss__clip_high": high,
        "loss__aggregation": draw(st.sampled_from(["token_mean", "seq_mean", "constant"])),
        "loss__kl_coef": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "loss__kl_estimator": draw(st.sampled_from(["k1", "k2", "k3"])),
        "loss__entropy_coef": draw(st.sampled_from([0.0, 0.0, 0.2])),
        "loss__dual_clip": draw(st.sampled_from([0.0, 1.5])) if kind == "ppo" else 0.0,
    }
    if draw(st.booleans()):
        chosen["loss__old_logprobs"] = "recompute"
        chosen["loss__mismatch_correction"] = draw(st.sampled_from(["none", "token", "sequence", "mask"]))
        chosen["loss__mismatch_cap"] = draw(st.sampled_from([1.1, 2.0]))
    return chosen


@st.composite
def algorithms(draw) -> dict[str, object]:
    return draw(losses()) | {
        "algorithm__advantage_mode": draw(st.sampled_from(["grpo", "dr_grpo", "rloo", "reinforce_pp", "maxrl"])),
        "algorithm__transform_mode": draw(
            st.sampled_from(["none", "gtpo", "gtpo_hicra", "gtpo_sepa", "gtpo_sepa_hicra"])
        ),
        "algorithm__uncertainty": draw(st.sampled_from(["auto", "surprisal", "variance"])),
        "algorithm__skip_uniform_groups": draw(st.booleans()),
        "gtpo__beta": draw(st.sampled_from([0.0, 0.1, 2.0])),
        "hicra__alpha": draw(st.sampled_from([0.0, 0.2])),
        "training__temperature": draw(st.sampled_from([0.6, 1.0, 1.7])),
    }


@st.composite
def drawn(draw) -> Case:
    """Any algorithm on any batch that carries a gradient: at least one group has unequal rewards."""
    size = st.integers(1, 9)
    lengths = draw(st.lists(st.tuples(size, st.lists(size, min_size=2, max_size=4).map(tuple)), min_size=1, max_size=3))
    reward = st.sampled_from([0.0, 0.25, 1.0])
    rewards = [tuple(draw(st.lists(reward, min_size=len(own), max_size=len(own)))) for _, own in lengths]
    rewards[0] = (1.0, 0.0, *rewards[0][2:])
    return Case(
        draw(algorithms()),
        tuple(lengths),
        tuple(rewards),
        draw(st.sampled_from([0.0, 0.3, 1.0])),
        draw(st.sampled_from([0.0, 0.4])),
        draw(st.sampled_from([0.0, 0.3])),
        draw(st.integers(0, 2**32 - 1)),
    )


def log_dists(model, batch: Batch, temperature: float) -> list[Tensor]:
    """Log-probs [T, V] of what each rollout is trained on, by one plain forward of transformers' for each."""
    dists = models.separate_logprobs(model, batch, temperature)
    return [d[torch.from_numpy(sampled(r))] for d, r in zip(dists, batch.rollouts, strict=True)]


def sampled(rollout) -> np.ndarray:
    return np.ones(len(rollout.tokens_T), dtype=bool) if rollout.sampled_T is None else rollout.sampled_T


def make_batch(case: Case, policy, config: Config) -> Batch:
    """The case's batch, credited by the product; sampler log-probs lie `noise` away from the policy's."""
    rng = np.random.default_rng(case.seed)
    groups = [_group(rng, i, *own, case.rewards_PG[i], case.masked) for i, own in enumerate(case.lengths)]
    planning = {id(c.tokens_T): rng.random(len(c.tokens_T)) < 0.3 for group in groups for c in group.completions}
    batch = credit(
        groups,
        config.algorithm,
        max_tokens=config.training.max_tokens,
        detect=lambda completions: [planning[id(tokens)] for tokens in completions],
        sepa_lambda=case.sepa_lambda,
    ).batch
    with torch.no_grad():
        dists = models.separate_logprobs(policy.lm, batch, config.training.temperature)
    near = [
        d.gather(1, torch.from_numpy(r.tokens_T)[:, None])[:, 0].numpy() + rng.normal(0, case.noise, len(d))
        for d, r in zip(dists, batch.rollouts, strict=True)
    ]
    return models.with_logprobs(batch, near)


def _group(rng, index: int, prompt: int, lengths: tuple[int, ...], rewards, masked: float) -> Group:
    completions = []
    for length in lengths:
        mask = rng.random(length) >= masked
        mask[-1] = True  # something was sampled
        tokens = rng.integers(2, models.VOCAB, length)
        completions.append(Completion(tokens, np.zeros(length, np.float32), "stop", 0, "", mask if masked else None))
    tokens = rng.integers(2, models.VOCAB, prompt)
    return Group(index, Example(f"p{index}", ""), tokens, tuple(completions), tuple(rewards), (None,) * len(rewards))


def oracle_loss(model, case: Case, config: Config, batch: Batch) -> Tensor:
    """Sections 1 to 6 of the algorithms, a line a formula; `model` is a plain PEFT model in float64."""
    c, mode, lam, beta = config.loss, config.algorithm.transform_mode, case.sepa_lambda, config.gtpo.beta
    news = log_dists(model, batch, config.training.temperature)
    with torch.no_grad(), model.disable_adapter():
        refs = log_dists(model, batch, config.training.temperature)
    count, tokens, total = len(news), sum(map(len, news)), torch.zeros((), dtype=torch.float64)
    for new, ref, r, A in zip(news, refs, batch.rollouts, oracle_advantages(case, config, news), strict=True):
        own, plan, behaviour = (torch.from_numpy(x[sampled(r)]) for x in (r.tokens_T, r.planning_T, r.logprobs_T))
        logp, logp_ref = (dist.gather(1, own[:, None])[:, 0] for dist in (new, ref))
        entropy, p = -(new.exp() * new).sum(1), logp.exp()
        U = {"auto": entropy, "surprisal": -logp, "variance": p * (1 - p)}[config.algorithm.uncertainty].detach()
        if "sepa" in mode and not plan.all():
            U = torch.where(plan, U, lam * U[~plan].mean() + (1 - lam) * U)
        a = A * (1 + beta * (U / U.mean() - 1)).clamp(min=0) if "gtpo" in mode and U.mean() >= 1e-7 else A + 0 * U
        a = a + config.hicra.alpha * a.abs() * plan if "hicra" in mode else a
        old = logp.detach() if c.old_logprobs == "recompute" else behaviour.double()
        log_ratio = (logp - old).mean().expand(len(own)) if c.kind == "gspo" else logp - old
        ratio, bounded = log_ratio.exp(), log_ratio.exp().clamp(1 - c.clip_low, 1 + c.clip_high)
        pessimist = torch.minimum(ratio * a, bounded * a)
        pessimist = torch.where(a < 0, pessimist.maximum(c.dual_clip * a), pessimist) if c.dual_clip else pessimist
        by_kind = {"importance_sampling": ratio * a, "cispo": bounded.detach() * a * logp}
        d = logp_ref - logp
        kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[c.kl_estimator]
        terms = -by_kind.get(c.kind, pessimist) + c.kl_coef * kl - c.entropy_coef * entropy
        drift = (old - behaviour).sum().expand(len(own)) if c.mismatch_correction == "sequence" else old - behaviour
        kept = (drift.exp() <= c.mismatch_cap).double() if c.mismatch_correction == "mask" else drift.exp()
        terms = terms * kept.clamp(max=c.mismatch_cap) if c.mismatch_correction != "none" else terms
        share = {"token_mean": tokens, "seq_mean": count * len(own), "constant": count * config.training.max_tokens}
        total = total + terms.sum() / share[c.aggregation]
    return total


def oracle_advantages(case: Case, config: Config, news: list[Tensor]) -> list[float]:
    """Of the rollouts that are trained on, from the rewards; uniform groups may have been dropped. Rounded to float32,
    as a batch carries them."""
    skip = config.algorithm.skip_uniform_groups
    groups = [rewards for rewards in case.rewards_PG if len(set(rewards)) > 1 or not skip]
    ids = [i for i, rewards in enumerate(groups) for _ in rewards]
    rewards = [reward for group in groups for reward in group]
    values = oracle.episode_advantages(rewards, ids, list(map(len, news)), config.algorithm.advantage_mode)
    return [float(np.float32(value)) for value in values]


def gradient_of(learner: Learner, batch: Batch) -> tuple[float, Tensor]:
    """Loss and gradient of a step; the adapter stays where it is (lr = 0)."""
    result = learner.step(batch, 0)
    assert result.skipped is None
    return result.metrics["loss"], torch.cat([p.grad.flatten() for p in learner.parameters])


def permuted(batch: Batch, order) -> Batch:
    return replace(batch, rollouts=tuple(batch.rollouts[i] for i in order))


def regrouped(batch: Batch, order) -> Batch:
    """The same prompts in another order."""
    place = {old: new for new, old in enumerate(order)}
    rollouts = tuple(replace(r, group=place[r.group]) for r in batch.rollouts)
    return replace(batch, prompts=tuple(batch.prompts[i] for i in order), rollouts=rollouts)
