"""Two processes that train together, over gloo: the same loss, gradient and figures as one, whatever the batch."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import learner_cases
import rank_tasks
import tiny_models as models
from learner_cases import cases, make_batch
from retrain.backend.recovery import NotFinite, OutOfMemory
from retrain.backend.sharing import shares
from retrain.distributed import ALONE, World
from retrain.inference.pytorch import PyTorchEngine
from retrain.training.spread import combined
from retrain.types import Batch, ConfigError, RetrainError


@pytest.fixture(scope="module")
def world():
    with rank_tasks.second_rank() as both:
        yield both


@pytest.fixture(scope="module")
def folder(model_folder) -> str:
    return str(model_folder("qwen3"))


def flat(tensors) -> torch.Tensor:
    return torch.cat([torch.zeros(0) if t is None else t.flatten().double() for t in tensors])


def assert_same(one, two, tolerance: float) -> None:
    """Results of `rank_tasks.step`: metrics, records, gradients, parameters."""
    (a, gradients_a, parameters_a), (b, gradients_b, parameters_b) = one, two
    assert (a.skipped, a.culprits) == (b.skipped, b.culprits)
    assert [g is None for g in gradients_a] == [g is None for g in gradients_b]
    assert a.metrics.keys() == b.metrics.keys()
    for name, value in a.metrics.items():
        other = b.metrics[name]
        assert value is other or math.isclose(value, other, rel_tol=tolerance, abs_tol=tolerance), name
    np.testing.assert_allclose(np.array(a.uncertainty), np.array(b.uncertainty), rtol=tolerance, atol=tolerance)
    assert len(a.credit) == len(b.credit)
    for own, other in zip(a.credit, b.credit, strict=True):
        for x, y in zip(own, other, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # float32 whatever the model
    for x, y in ((flat(gradients_a), flat(gradients_b)), (flat(parameters_a), flat(parameters_b))):
        assert (x - y).norm() <= tolerance * (1e-3 + y.norm())


# ---- the plan -----------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.lists(st.integers(1, 90), min_size=1, max_size=5)), max_size=9),
    ranks=st.integers(1, 6),
    shared=st.booleans(),
)
def test_every_rollout_has_one_rank_and_the_ranks_are_balanced(lengths, ranks, shared):
    batch = models.random_batch(0, [prompt for prompt, _ in lengths], [own for _, own in lengths])
    plan = shares(batch, ranks, share_prompts=shared)
    assert len(plan) == ranks
    assert sorted(i for own in plan for i in own) == list(range(len(batch.rollouts)))
    cost = [prompt * (1 if shared else len(own)) + sum(own) for prompt, own in lengths]
    loads = [sum(cost[group] for group in {batch.rollouts[i].group for i in own}) for own in plan]
    assert max(loads) <= sum(cost) / ranks + max(cost, default=0)
    for group in range(len(lengths)):  # a prompt is computed once
        assert sum(any(batch.rollouts[i].group == group for i in own) for own in plan) == 1


# ---- the learner --------------------------------------------------------------------------------------------------


@cases(30)
@given(case=learner_cases.drawn(), budget=st.sampled_from([8, 64, 16384]))
def test_loss_gradient_and_figures_are_those_of_one_process(world: World, folder, case, budget):
    config = case.config(folder).model_copy()
    config = config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_tokens": budget})})
    batch = make_batch(case, rank_tasks.backend_on(folder, True).policy, config)
    one = rank_tasks.step(ALONE, folder, True, config, batch)
    two = rank_tasks.call(world, "step", folder, True, config, batch)
    assert_same(one, two, case.tolerance)


@cases(12)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=4),
    minibatches=st.integers(1, 3),
    epochs=st.integers(1, 2),
    recompute=st.booleans(),
    aggregation=st.sampled_from(["token_mean", "seq_mean", "constant"]),
)
@example(lengths=[[3, 5]], minibatches=2, epochs=2, recompute=True, aggregation="token_mean")  # one rank has nothing
def test_several_updates_in_single_precision(
    world: World, folder, lengths, minibatches, epochs, recompute, aggregation
):
    config = models.config_for(
        folder,
        training__lr=1e-3,
        loss__kind="ppo",
        loss__minibatches=minibatches,
        loss__epochs=epochs,
        loss__aggregation=aggregation,
        loss__kl_coef=0.1,
        loss__old_logprobs="recompute" if recompute else "sampler",
    )
    batch = models.random_batch(len(lengths), [4 + i for i in range(len(lengths))], lengths)
    one = rank_tasks.step(ALONE, folder, False, config, batch, 2)
    two = rank_tasks.call(world, "step", folder, False, config, batch, 2)
    assert_same(one, two, 2e-4)
    assert len(set(rank_tasks.call(world, "digests", folder))) == 1


def ragged() -> Batch:
    return models.random_batch(5, [3, 11, 6], [[5, 1, 9, 2], [4, 4, 12], [7, 3]])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_number_that_is_not_finite_on_one_rank_takes_the_step_back_on_all(world: World, folder, rank):
    config = models.config_for(folder)
    result, gradients, parameters = rank_tasks.call(world, "step", folder, False, config, ragged(), 1, ("nan", rank))
    own = shares(ragged(), 2, share_prompts=True)[rank]
    assert result.skipped == "log-probabilities"
    assert set(result.culprits) <= own
    assert result.culprits
    assert gradients == [None] * len(gradients)
    assert torch.equal(flat(parameters), flat(rank_tasks.stirred(folder, False)))
    assert len(set(rank_tasks.call(world, "digests", folder))) == 1


def test_a_gradient_that_overflows_names_the_rollout_wherever_it_is(world: World, folder):
    config = models.config_for(folder)
    batch = ragged()
    for place in (0, 5, 8):
        rollouts = list(batch.rollouts)
        rollouts[place] = dataclasses.replace(rollouts[place], advantage=3e38)
        spoilt = dataclasses.replace(batch, rollouts=tuple(rollouts))
        result, _, _ = rank_tasks.call(world, "step", folder, False, config, spoilt)
        assert result.skipped in ("loss", "gradient")
        assert result.culprits == (place,)


@pytest.mark.parametrize("rank", [0, 1])
def test_where_memory_runs_out_on_one_rank_all_go_on_with_less(world: World, folder, rank):
    config = models.config_for(folder, training__micro_batch_tokens=32)
    two = rank_tasks.call(world, "step", folder, False, config, ragged(), 1, ("memory", rank))
    assert two[0].metrics["micro_batch_tokens"] <= 16
    one = rank_tasks.step(ALONE, folder, False, config, ragged())
    metrics = one[0].metrics | {"micro_batch_tokens": two[0].metrics["micro_batch_tokens"]}
    assert_same((dataclasses.replace(one[0], metrics=metrics), *one[1:]), two, 1e-4)


# ---- a sharded base -----------------------------------------------------------------------------------------------


@cases(8)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=4),
    minibatches=st.integers(1, 2),
    recompute=st.booleans(),
    kl=st.sampled_from([0.0, 0.1]),
    budget=st.sampled_from([8, 16384]),
)
@example(lengths=[[3, 5]], minibatches=2, recompute=True, kl=0.1, budget=8)  # one rank has nothing
def test_a_sharded_base_trains_as_a_whole_one(world, folder, lengths, minibatches, recompute, kl, budget):
    config = models.config_for(
        folder,
        training__lr=1e-3,
        training__micro_batch_tokens=budget,
        loss__kind="ppo",
        loss__minibatches=minibatches,
        loss__kl_coef=kl,
        loss__old_logprobs="recompute" if recompute else "sampler",
    )
    batch = models.random_batch(len(lengths), [4 + i for i in range(len(lengths))], lengths)
    one = rank_tasks.step(ALONE, folder, False, config, batch, 2)
    two = rank_tasks.call(world, "step", folder, False, config, batch, 2, None, True)
    assert_same(one, two, 2e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_number_that_is_not_finite_leaves_no_rank_inside_a_pass(world: World, folder, rank):
    config = models.config_for(folder, training__micro_batch_tokens=16)
    words = ("step", folder, False, config, ragged(), 1, ("nan", rank), True)
    result, _, _ = rank_tasks.call(world, *words)
    assert result.skipped == "log-probabilities"
    assert set(result.culprits) <= shares(ragged(), 2, share_prompts=True)[rank]
    two = rank_tasks.call(world, "step", folder, False, config, ragged(), 1, None, True)
    assert_same(rank_tasks.step(ALONE, folder, False, config, ragged()), two, 2e-4)


def test_a_sharded_base_has_the_digest_of_the_whole_one(world: World, folder):
    whole = rank_tasks.backend_on(folder, False).base_digest()
    assert rank_tasks.call(world, "sharded_digest", folder) == whole


def test_log_probs_that_the_first_rank_alone_asks_for(world: World, folder):
    rng = np.random.default_rng(0)
    texts = [(rng.integers(2, models.VOCAB, 4), rng.integers(2, models.VOCAB, n)) for n in (1, 7)]
    backend = rank_tasks.backend_on(folder, False)
    rank_tasks.step(ALONE, folder, False, models.config_for(folder, training__lr=0.0), ragged())
    rank_tasks.call(world, "step", folder, False, models.config_for(folder, training__lr=0.0), ragged(), 1, None, True)
    for i, (text, found) in enumerate(
        zip(texts, rank_tasks.call(world, "sharded_logprobs", folder, texts), strict=True)
    ):
        expected = backend.logprobs(*text, temperature=0.7, adapter=i % 2 == 0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_sampling_in_lockstep_where_one_rank_has_nothing_to_sample(world: World, folder, rank):
    prompts = [np.arange(5, 9), np.arange(20, 31)]
    rank_tasks.step(ALONE, folder, False, models.config_for(folder, training__lr=0.0), ragged())
    rank_tasks.call(world, "step", folder, False, models.config_for(folder, training__lr=0.0), ragged(), 1, None, True)
    engine = PyTorchEngine(rank_tasks.backend_on(folder, False).policy, merged_copy=False)
    expected = rank_tasks.sampled(engine, prompts)
    for ours, theirs in zip(expected, rank_tasks.call(world, "sharded_samples", folder, prompts, rank), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.tokens_T.tolist() == b.tokens_T.tolist()
            np.testing.assert_allclose(a.logprobs_T, b.logprobs_T, rtol=1e-4, atol=1e-5)


# ---- what the ranks do in common ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (RetrainError, ("a message",)),
        (ConfigError, ("a key",)),
        (OSError, (28, "No space left on device")),
        (NotFinite, ("loss", (1, 2))),
        (OutOfMemory, (64, 3)),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_everybodys(world: World, kind, words, rank):
    with pytest.raises(kind) as caught:
        rank_tasks.call(world, "fail_on", rank, kind, *words)
    assert str(caught.value) == str(kind(*words))


def test_a_world_of_one_does_nothing():
    with pytest.raises(ZeroDivisionError):
        ALONE.each(lambda: 1 / 0)
    tensor = torch.ones(2)
    ALONE.sum_([tensor])
    ALONE.same("anything", object())
    assert (ALONE.gather(3), ALONE.first(lambda: 4), ALONE.any(False), ALONE.any(True)) == ([3], 4, False, True)
    assert torch.equal(tensor, torch.ones(2))
    assert ALONE.group() is ALONE


def test_figures_of_several_scorers():
    one = {"judge_requests": 3, "judge_cached": 1, "judge_latency_s": 0.5}
    two = {"judge_requests": 1, "judge_cached": 0, "judge_latency_s": 1.5}
    idle = {"judge_requests": 0, "judge_cached": 2, "judge_latency_s": None}
    assert combined([one, two, idle]) == {"judge_requests": 4, "judge_cached": 3, "judge_latency_s": 0.75}
    assert combined([idle, idle])["judge_latency_s"] is None
    assert combined([{}, {}]) == {}
