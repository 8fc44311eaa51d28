"""What a Tinker service is sent of an update, and what is made of its answer: without a service, without the SDK."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models as models
from retrain.backend.tinker.update import check_gap, measured, prepare
from retrain.config.service import KINDS
from retrain.types import RetrainError
from retrain_kernels import token_advantages

PROMPTS, COMPLETIONS = [3, 1], [[5, 2, 9], [1, 4]]
TEMPERATURE = {"training__temperature": 1.0, "training__max_tokens": 9}


def batch_of(seed=0, prompts=PROMPTS, completions=COMPLETIONS):
    return models.random_batch(seed, prompts, completions)


def config_of(**overrides):
    return models.config_for("builtin:tiny", **TEMPERATURE, **overrides)


def in_order(update):
    """Positions in the batch of the datums."""
    return [member for micro in update.micros for member in micro.members]


def token_loss(kind, logprob, old, advantage, low, high):
    """As the Tinker API describes its losses, in float64."""
    ratio = np.exp(logprob - old)
    clipped = np.clip(ratio, low, high)
    return {
        "importance_sampling": -ratio * advantage,
        "ppo": -np.minimum(ratio * advantage, clipped * advantage),
        "cispo": -clipped * logprob * advantage,
    }[kind]


def service_loss(reduction, update, logprobs, kind, low, high):
    """What a service makes of what it is sent, written as it is described."""
    means, total = [], 0.0
    for datum, logprob in zip(update.datums, logprobs, strict=True):
        old, advantage = (x.astype(np.float64) for x in (datum.logprobs, datum.advantages))
        loss = token_loss(kind, logprob, old, advantage, low, high)
        total += loss.sum()
        means.append((loss * datum.weights).sum() / datum.weights.sum())
    return total if reduction == "sum" else sum(means) / len(means)


def config_loss(config, batch, members, logprobs, advantages):
    """The loss that the config asks for, token by token: docs of [loss]."""
    kind, aggregation = config.loss.kind, config.loss.aggregation
    low, high = 1 - config.loss.clip_low, 1 + config.loss.clip_high
    tokens = sum(len(batch.rollouts[i].tokens_T) for i in members)
    total = 0.0
    for i, logprob, advantage in zip(members, logprobs, advantages, strict=True):
        old = batch.rollouts[i].logprobs_T.astype(np.float64)
        loss = token_loss(kind, logprob, old, advantage.astype(np.float64), low, high).sum()
        share = {"token_mean": tokens, "seq_mean": len(members) * len(logprob), "constant": len(members) * 9}
        total += loss / share[aggregation]
    return total


def answer(update, trained):
    """[S - 1] a datum, as a service answers: log-probs of prompt tokens too."""
    found = []
    for datum, values in zip(update.datums, trained, strict=True):
        logprobs = np.full(len(datum.targets), -7.0)
        logprobs[datum.weights > 0] = values
        found.append(logprobs)
    return found


def test_a_datum_predicts_each_next_token():
    batch = batch_of()
    update = prepare(batch, range(5), config_of(), uncertainty="surprisal", reduction="sum")
    assert sorted(in_order(update)) == [0, 1, 2, 3, 4]
    for member, datum in zip(in_order(update), update.datums, strict=True):
        rollout = batch.rollouts[member]
        prompt = batch.prompts[rollout.group]
        assert datum.inputs.tolist() + datum.targets.tolist()[-1:] == [*prompt, *rollout.tokens_T]
        assert datum.inputs.tolist()[1:] == datum.targets.tolist()[:-1]
        first = len(prompt) - 1
        assert datum.weights.tolist() == [0.0] * first + [1.0] * len(rollout.tokens_T)
        assert datum.logprobs[first:].tolist() == rollout.logprobs_T.tolist()
        assert datum.targets[first:].tolist() == rollout.tokens_T.tolist()
        for values in (datum.logprobs, datum.advantages):
            assert values.dtype == np.float32
            assert not values[:first].any()
        # transform_mode "none", the mean over the tokens of the update.
        assert datum.advantages[first:] == pytest.approx(rollout.advantage / 21, rel=1e-6)


def test_tokens_of_an_environment_are_context():
    batch = batch_of(prompts=[2], completions=[[4]])
    rollout = dataclasses.replace(batch.rollouts[0], sampled_T=np.array([True, False, False, True]))
    batch = dataclasses.replace(batch, rollouts=(rollout,))
    update = prepare(batch, range(1), config_of(), uncertainty="surprisal", reduction="sum")
    (datum,) = update.datums
    assert datum.weights.tolist() == [0, 1, 0, 0, 1]
    assert datum.advantages.tolist() == pytest.approx([0, rollout.advantage / 2, 0, 0, rollout.advantage / 2])
    assert datum.targets.tolist() == [batch.prompts[0][1], *rollout.tokens_T]


@pytest.mark.parametrize("transform", ["none", "gtpo", "gtpo_hicra", "gtpo_sepa", "gtpo_sepa_hicra"])
@pytest.mark.parametrize("uncertainty", ["surprisal", "variance"])
def test_credit_is_that_of_the_algorithm(transform, uncertainty):
    batch = dataclasses.replace(batch_of(), sepa_lambda=0.3)
    config = config_of(algorithm__transform_mode=transform, gtpo__beta=0.4)
    update = prepare(batch, range(5), config, uncertainty=uncertainty, reduction="sum")
    for member, datum in zip(in_order(update), update.datums, strict=True):
        rollout = batch.rollouts[member]
        p = np.exp(rollout.logprobs_T.astype(np.float64))
        value = {"surprisal": -rollout.logprobs_T, "variance": (p * (1 - p))}[uncertainty]
        expected = token_advantages(
            torch.tensor([rollout.advantage]),
            torch.from_numpy(np.maximum(value, 0).astype(np.float32)),
            torch.from_numpy(rollout.planning_T),
            torch.tensor([0, len(value)], dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            advantage_mode="precomputed",
            transform_mode=transform,
            gtpo_beta=0.4,
            hicra_alpha=0.2,
            sepa_lambda=0.3,
        )
        assert datum.advantages[datum.weights > 0] * 21 == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["importance_sampling", "ppo", "cispo"]),
    aggregation=st.sampled_from(["token_mean", "seq_mean", "constant"]),
    service=st.sampled_from(sorted(KINDS)),
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_the_service_is_made_to_compute_the_loss_of_the_config(kind, aggregation, service, lengths, seed):
    """Whatever its reduction; and what is reported is that loss."""
    batch = batch_of(seed, [1 + i for i in range(len(lengths))], lengths)
    clips = {} if kind == "importance_sampling" else {"loss__clip_low": 0.3, "loss__clip_high": 0.1}
    config = config_of(loss__kind=kind, loss__aggregation=aggregation, **clips)
    members = range(len(batch.rollouts))
    reduction = KINDS[service].reduction
    update = prepare(batch, members, config, uncertainty="surprisal", reduction=reduction)
    rng = np.random.default_rng(seed)
    order = in_order(update)
    trained = [batch.rollouts[i].logprobs_T + rng.normal(0, 0.3, len(batch.rollouts[i].tokens_T)) for i in order]
    trained = [values.astype(np.float32).astype(np.float64) for values in trained]
    advantages = [np.full(len(values), batch.rollouts[i].advantage) for i, values in zip(order, trained, strict=True)]
    expected = config_loss(config, batch, order, trained, advantages)
    low, high = 1 - config.loss.clip_low, 1 + config.loss.clip_high
    found = service_loss(reduction, update, answer(update, trained), kind, low, high)
    scale = 1e-6 + sum(abs(a).max() for a in advantages)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5 * scale)
    sums, _ = measured(update, answer(update, trained), config)
    assert sums["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale)


def test_what_is_measured():
    batch, config = batch_of(), config_of()
    update = prepare(batch, [4, 1, 0], config, uncertainty="surprisal", reduction="sum")
    assert sorted(in_order(update)) == [0, 1, 4]
    assert update.denominator == 5 + 2 + 4
    moved = [batch.rollouts[i].logprobs_T.astype(np.float64) for i in in_order(update)]
    moved[1] = moved[1] + np.log(1.5)
    sums, records = measured(update, answer(update, moved), config)
    shifted = len(moved[1])
    assert sums["tokens"] == 11
    assert sums["ratio_sum"] == pytest.approx(11 + 0.5 * shifted, rel=1e-5)
    gap = torch.cat([record.gap_N for record in records])
    assert gap.max().item() == pytest.approx(np.log(1.5), rel=1e-5)
    assert all(record.entropy_N is None for record in records)
    check_gap(records, 0.0)
    check_gap(records, 0.5)
    with pytest.raises(RetrainError, match=r"disagree by 0\.405 nats .* inference\.max_logprob_gap = 0\.1"):
        check_gap(records, 0.1)


def test_log_probs_that_are_not_finite():
    batch, config = batch_of(), config_of()
    update = prepare(batch, range(5), config, uncertainty="surprisal", reduction="sum")
    logprobs = [np.zeros(len(datum.targets)) for datum in update.datums]
    logprobs[2][-1] = np.nan
    with pytest.raises(RetrainError, match=r"not finite.*training\.lr"):
        measured(update, logprobs, config)
