"""The learner: against the formulas in float64, one token at a time, and against itself however a batch is cut."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

import oracle
import tiny_models as models
from retrain.inference.pytorch import PyTorchEngine
from retrain.types import Batch, RetrainError, Rollout

PROMPTS, COMPLETIONS = [3, 11, 6], [[5, 1, 9, 2], [4, 4, 12], [7, 3]]


def limited(learner, **training):
    """The learner with other `[training]` values."""
    learner.training = learner.training.model_copy(update=training)
    return learner


def gradients(learner):
    return torch.cat([p.grad.flatten() for p in learner.parameters])


def parameters(learner):
    return torch.cat([p.detach().flatten().double() for p in learner.parameters])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def permuted(batch, order):
    return dataclasses.replace(batch, rollouts=tuple(batch.rollouts[i] for i in order))


def micro_batches(learner, batch):
    return len(learner._pack(batch, range(len(batch.rollouts))))


# ---- the oracle ---------------------------------------------------------------------------------------------------


def oracle_update(model, reference, batch, members, config, old):
    """Loss of one optimizer update: the formulas of the algorithms, completion by completion and token by token."""
    loss, algorithm = config.loss, config.algorithm
    dists = models.separate_logprobs(model, batch, config.training.temperature)
    total = torch.zeros((), dtype=torch.float64)
    tokens = sum(len(batch.rollouts[i].tokens_T) for i in members)
    for i in members:
        rollout, dist = batch.rollouts[i], dists[i]
        new = [dist[t, token] for t, token in enumerate(rollout.tokens_T)]
        entropy = [-(row.exp() * row).sum() for row in dist]
        p = [n.exp().item() for n in new]
        spread = {
            "entropy": [h.item() for h in entropy],
            "surprisal": [-n.item() for n in new],
            "variance": [x * (1 - x) for x in p],
        }["entropy" if algorithm.uncertainty == "auto" else algorithm.uncertainty]
        credit = oracle.token_advantages(
            rollout.advantage, spread, rollout.planning_T, algorithm.transform_mode,
            beta=config.gtpo.beta, alpha=config.hicra.alpha, sepa_lambda=batch.sepa_lambda,
        )  # fmt: skip
        sampler = rollout.logprobs_T.tolist()
        before = sampler if old is None else old[i]
        log_ratio = [n - o for n, o in zip(new, before, strict=True)]
        if loss.kind == "gspo":
            log_ratio = [sum(log_ratio) / len(log_ratio)] * len(log_ratio)
        gap = [o - s for o, s in zip(before, sampler, strict=True)]
        own = 0.0
        for t, a in enumerate(credit):
            ratio = log_ratio[t].exp()
            clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
            if loss.kind == "importance_sampling":
                term = -a * ratio
            elif loss.kind == "cispo":
                term = -clipped.detach() * a * new[t]
            else:
                term = -torch.minimum(ratio * a, clipped * a)
                if loss.dual_clip and a < 0:
                    term = term.clamp(max=-loss.dual_clip * a)
            if loss.kl_coef:
                d = reference[i][t] - new[t]
                term = term + loss.kl_coef * {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[loss.kl_estimator]
            term = term - loss.entropy_coef * entropy[t]
            rho = math.exp(sum(gap) if loss.mismatch_correction == "sequence" else gap[t])
            weight = (
                float(rho <= loss.mismatch_cap) if loss.mismatch_correction == "mask" else min(rho, loss.mismatch_cap)
            )
            own = own + term * (1.0 if loss.mismatch_correction == "none" else weight)
        total = total + own * {
            "token_mean": 1 / tokens,
            "seq_mean": 1 / (len(rollout.tokens_T) * len(members)),
            "constant": 1 / (len(members) * config.training.max_tokens),
        }[loss.aggregation]  # fmt: skip
    return total


def chosen(dists, batch):
    return [
        [row[t, token].item() for t, token in enumerate(rollout.tokens_T)]
        for row, rollout in zip(dists, batch.rollouts, strict=True)
    ]


def oracle_step(folder, base, batch, config):
    """Mean loss and the adapter after a step, from the adapter in `folder` on a plain model."""
    # "eager" attention of transformers would take its softmax in float32.
    model = models.load_with_peft(base, folder, attention="sdpa", trainable=True)
    models.in_float64(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.training.lr, betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps, weight_decay=config.training.weight_decay,
    )  # fmt: skip
    temperature, losses = config.training.temperature, []
    with torch.no_grad():
        start = chosen(models.separate_logprobs(model, batch, temperature), batch)
        with model.disable_adapter():
            reference = chosen(models.separate_logprobs(model, batch, temperature), batch)
    old = start if config.loss.old_logprobs == "recompute" else None
    for _, part in itertools.product(range(config.loss.epochs), range(config.loss.minibatches)):
        optimizer.zero_grad()
        members = range(part, len(batch.rollouts), config.loss.minibatches)
        loss = oracle_update(model, reference, batch, members, config, old)
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in trained))
        for p in trained:
            p.grad *= min(1.0, config.training.max_grad_norm / (norm + 1e-6))
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses), torch.cat([p.detach().flatten() for p in trained])


RECOMPUTE = {"loss__old_logprobs": "recompute"}
CASES = {
    "is": {},
    "is-surprisal-gtpo": {"algorithm__transform_mode": "gtpo", "algorithm__uncertainty": "surprisal"},
    "is-variance-hicra": {"algorithm__transform_mode": "gtpo_hicra", "algorithm__uncertainty": "variance"},
    "ppo-sepa-seq": {
        "loss__kind": "ppo", "loss__dual_clip": 1.5, "algorithm__transform_mode": "gtpo_sepa",
        "loss__aggregation": "seq_mean",
    },
    "cispo-all-constant": {
        "loss__kind": "cispo", "algorithm__transform_mode": "gtpo_sepa_hicra", "loss__aggregation": "constant",
    },
    "gspo-seq": {"loss__kind": "gspo", "loss__clip_low": 0.1, "loss__clip_high": 0.1, "loss__aggregation": "seq_mean"},
    "gspo-tight": {"loss__kind": "gspo"},
    "kl-k1": {"loss__kl_coef": 0.3, "loss__kl_estimator": "k1"},
    "kl-k2-entropy": {"loss__kl_coef": 0.3, "loss__kl_estimator": "k2", "loss__entropy_coef": 0.2},
    "kl-k3-checkpointing": {"loss__kl_coef": 0.3, "training__gradient_checkpointing": True},
    "recompute": RECOMPUTE,
    "recompute-token": {**RECOMPUTE, "loss__mismatch_correction": "token", "loss__mismatch_cap": 1.2},
    "recompute-sequence": {**RECOMPUTE, "loss__mismatch_correction": "sequence", "loss__kind": "ppo"},
    "recompute-mask": {**RECOMPUTE, "loss__mismatch_correction": "mask", "loss__mismatch_cap": 1.1},
    "epochs-minibatches": {"loss__epochs": 2, "loss__minibatches": 2, "loss__kind": "ppo"},
    "recompute-epochs-minibatches-token": {
        **RECOMPUTE, "loss__epochs": 2, "loss__minibatches": 2, "loss__mismatch_correction": "token",
        "loss__kind": "ppo", "loss__kl_coef": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_what_the_formulas_say(case, open_local, model_folder, tmp_path):
    kind = models.PLAIN[list(CASES).index(case) % len(models.PLAIN)]
    # A large eps keeps Adam smooth: with the usual one a gradient's rounding decides the sign of a step.
    smooth = {
        "optimizer__eps": 1.0,
        "training__lr": 0.5,
        "training__weight_decay": 0.01,
        "training__micro_batch_tokens": 40,
    }
    backend = open_local(kind, float64=True, **{**smooth, **CASES[case]})
    learner = backend.learner
    config = models.config_for(model_folder(kind), **{**smooth, **CASES[case]})
    batch = models.random_batch(1, PROMPTS, COMPLETIONS, sepa_lambda=0.4)
    # Sampler log-probs near the policy's: ratios on both sides of the clipping.
    noise = np.random.default_rng(0)
    with torch.no_grad():
        near = chosen(models.separate_logprobs(backend.policy.lm, batch, config.training.temperature), batch)
    batch = models.with_logprobs(batch, [np.array(row) + noise.normal(0, 0.3, len(row)) for row in near])
    backend.save_adapter(tmp_path)
    want_loss, want = oracle_step(tmp_path, model_folder(kind), batch, config)
    before = parameters(learner)
    assert micro_batches(learner, batch) > 1
    metrics = backend.step(batch, 0).metrics
    tolerance = (
        1e-9 if CASES[case].keys().isdisjoint({"algorithm__transform_mode", "loss__mismatch_correction"}) else 1e-6
    )
    assert metrics["loss"] == pytest.approx(want_loss, rel=tolerance)
    moved = want - before
    assert moved.norm() > 1e-3
    assert (parameters(learner) - want).norm() <= tolerance * moved.norm()


# ---- invariance, in float32 and of an adapter; in float64, and of all that can be drawn: test_invariants.py ---------


def loss_and_gradient(learner, batch):
    loss = learner.step(batch, 0).metrics["loss"]
    return loss, gradients(learner)


@pytest.fixture
def still(open_local):
    """A learner whose steps leave the adapter where it is (lr = 0) and its gradient unclipped."""

    def make(kind, **overrides):
        values = {"training__lr": 0.0, "training__max_grad_norm": 0.0, "loss__kind": "ppo", **overrides}
        return open_local(kind, **values).learner

    return make


@pytest.mark.parametrize("kind", models.PLAIN)
def test_in_float32_cuts_differ_by_rounding_only(kind, still):
    learner = still(kind, algorithm__transform_mode="gtpo_sepa_hicra")
    batch = models.random_batch(2, PROMPTS, COMPLETIONS, sepa_lambda=0.5)
    loss, gradient = loss_and_gradient(learner, batch)
    for share, budget in itertools.product((True, False), (1, 50)):
        learner.share_prompts = share
        got_loss, got_gradient = loss_and_gradient(limited(learner, micro_batch_tokens=budget), batch)
        assert got_loss == pytest.approx(loss, rel=1e-5)
        assert relative(got_gradient, gradient) < 1e-5


def test_a_step_on_one_micro_batch_equals_the_step_on_eight(open_local):
    batch = models.random_batch(3, [4] * 8, [[9]] * 8)
    after = []
    for budget, count in ((10_000, 1), (13, 8)):
        backend = open_local("llama", float64=True, training__lr=1e-2, training__micro_batch_tokens=budget)
        assert micro_batches(backend.learner, batch) == count
        for step in range(3):
            backend.step(batch, step)
        after.append(parameters(backend.learner))
    assert relative(after[0], after[1]) < 1e-9


def test_other_prompts_and_completions_do_not_leak_into_a_log_probability(still):
    learner = still("qwen3", float64=True)
    batch = models.random_batch(2, [6, 6], [[5, 7, 3], [4, 8]])
    strangers = (batch.prompts[0], (batch.prompts[1] + 7) % models.VOCAB)
    rollouts = list(batch.rollouts)
    for i in (1, 3):
        rollouts[i] = dataclasses.replace(rollouts[i], tokens_T=(rollouts[i].tokens_T + 11) % models.VOCAB)

    def logprobs(of):
        (micro,) = learner._pack(of, range(5))
        assert len(micro.tokens_RS) == 2
        with torch.no_grad():
            parts = learner._logprob(micro)[0].split((micro.cu_seqlens[1:] - micro.cu_seqlens[:-1]).tolist())
        return dict(zip(micro.members, parts, strict=True))

    before, after = logprobs(batch), logprobs(Batch(strangers, tuple(rollouts)))
    for i in (0, 2):
        torch.testing.assert_close(after[i], before[i], rtol=0, atol=0)
    for i in (1, 3, 4):
        assert (after[i] - before[i]).abs().max() > 1e-3


# ---- on policy ----------------------------------------------------------------------------------------------------


def sampled(backend, *, temperature, max_tokens=20):
    prompts = [np.arange(2, 2 + n) for n in (3, 17, 8)]
    streams = np.arange(12, dtype=np.uint64).reshape(3, 4)
    answers = PyTorchEngine(backend.policy).generate(prompts, streams, max_tokens=max_tokens, temperature=temperature)
    rollouts = tuple(
        Rollout(p, c.tokens_T, c.logprobs_T, (-1.0) ** g, np.zeros(len(c), dtype=bool))
        for p, group in enumerate(answers)
        for g, c in enumerate(group)
    )
    return Batch(tuple(prompts), rollouts)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("kind", [*models.PLAIN, "mistral-window"])
def test_the_first_update_of_a_sampled_batch_is_on_policy(kind, temperature, open_local):
    backend = open_local(kind, training__temperature=temperature, loss__kind="ppo")
    batch = sampled(backend, temperature=temperature)
    with torch.no_grad():
        whole = models.separate_logprobs(backend.policy.lm, batch, temperature)
    for want, rollout in zip(chosen(whole, batch), batch.rollouts, strict=True):
        assert np.abs(np.array(want) - rollout.logprobs_T).max() < 1e-4
    metrics = backend.step(batch, 0).metrics
    assert metrics["logprob_gap_mean"] <= metrics["logprob_gap_max"] < 1e-4
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert metrics["clip_fraction"] == 0


def test_recomputed_log_probs_give_a_ratio_of_exactly_one(open_local):
    backend = open_local("qwen3", loss__old_logprobs="recompute", loss__kind="ppo", lora__dropout=0.3)
    metrics = backend.step(models.random_batch(2, PROMPTS, COMPLETIONS), 0).metrics
    assert (metrics["ratio_mean"], metrics["clip_fraction"]) == (1.0, 0.0)
    assert metrics["logprob_gap_max"] > 1e-2


def test_a_wrong_temperature_shows_in_the_gap_and_can_stop_the_run(open_local):
    backend = open_local("qwen3", training__temperature=1.0, inference__max_logprob_gap=1e-3)
    before = parameters(backend.learner)
    with pytest.raises(RetrainError, match=r"disagree by .* inference\.max_logprob_gap = 0\.001"):
        backend.step(sampled(backend, temperature=0.9), 0)
    assert torch.equal(parameters(backend.learner), before)
    backend.step(sampled(backend, temperature=1.0), 0)
    assert not torch.equal(parameters(backend.learner), before)


# ---- what a step reports ------------------------------------------------------------------------------------------


def test_a_policy_that_diverged_cannot_be_sampled(open_local):
    backend = open_local("gpt2")
    with torch.no_grad():
        backend.learner.parameters[0].fill_(math.nan)
    with pytest.raises(RetrainError, match=r"nothing can be sampled.* lower training\.lr"):
        sampled(backend, temperature=1.0)


def test_metrics_and_uncertainties_are_of_the_right_tokens(open_local):
    backend = open_local("llama", training__micro_batch_tokens=30, training__lr=2e-3, training__warmup_steps=4)
    batch = models.random_batch(4, PROMPTS, COMPLETIONS)
    with torch.no_grad():
        dists = models.separate_logprobs(backend.policy.lm, batch, 0.8)
    entropies = [-(d.exp() * d).sum(-1).double().numpy() for d in dists]
    result = backend.step(batch, 1)
    assert result.metrics["lr"] == pytest.approx(1e-3)
    for (mean, peak), entropy in zip(result.uncertainty, entropies, strict=True):
        assert (mean, peak) == pytest.approx((entropy.mean(), entropy.max()), rel=1e-5)
    every, planning = np.concatenate(entropies), np.concatenate([r.planning_T for r in batch.rollouts])
    want = {
        "entropy_mean": every.mean(),
        "exec_entropy_mean": every[~planning].mean(),
        "exec_entropy_var": every[~planning].var(),
        "plan_entropy_mean": every[planning].mean(),
        "plan_entropy_var": every[planning].var(),
        "planning_fraction": planning.mean(),
        "exec_uncertainty_var": every[~planning].var(),
    }
    assert {key: result.metrics[key] for key in want} == pytest.approx(want, rel=1e-4)
    assert all(value is None or math.isfinite(value) for value in result.metrics.values())


def test_without_planning_tokens_their_statistics_are_absent(open_local):
    batch = models.random_batch(4, [3], [[4, 4]])
    plain = tuple(dataclasses.replace(r, planning_T=np.zeros(4, dtype=bool)) for r in batch.rollouts)
    metrics = open_local("gpt2").step(dataclasses.replace(batch, rollouts=plain), 0).metrics
    assert (metrics["plan_entropy_mean"], metrics["plan_entropy_var"], metrics["planning_fraction"]) == (None, None, 0)


def test_more_minibatches_than_rollouts(open_local):
    backend = open_local("gpt2", loss__minibatches=5)
    result = backend.step(models.random_batch(4, [3], [[4, 4]]), 0)
    assert len(result.uncertainty) == 2
