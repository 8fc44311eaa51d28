"""What the whole learner promises, whatever is drawn: loss and gradient are those of the formulas, in float64, and do
not depend on how a batch is cut, ordered, padded or packed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_models as models
from learner_cases import Case, cases, drawn, gradient_of, make_batch, oracle_loss, permuted, regrouped, sampled
from retrain.backend import packing
from retrain.backend.learner import Learner
from retrain.types import Rollout
from retrain_kernels.linear_logprob import reference

KINDS = ("qwen3", "gpt2", "llama")


@pytest.fixture(scope="module")
def policies(model_folder):
    """A policy of each architecture in float64, its adapter stirred: opened once."""
    from retrain.backend.model import load_policy

    opened = {}
    for kind in KINDS:
        config = models.config_for(model_folder(kind))
        device = torch.device("cpu")
        policy = load_policy(config.model, config.lora, config.training, device, lora_seed=0, say=lambda line: None)
        models.stir(policy.peft)
        models.in_float64(policy.peft)
        opened[kind] = policy
    return opened


def open_case(policies, case: Case):
    """(learner, batch, config): of the architecture that the case's seed chooses."""
    policy = policies[KINDS[case.seed % len(KINDS)]]
    config = case.config("unused")
    return Learner(policy, config), make_batch(case, policy, config), config


def assert_same(got, want, tolerance: float) -> None:
    (loss, gradient), (wanted, expected) = got, want
    assert loss == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    assert (gradient - expected).norm() <= tolerance * expected.norm() + 1e-12


# ---- the formulas -------------------------------------------------------------------------------------------------


def test_loss_and_gradient_are_what_the_formulas_say(policies):
    @cases(40)
    @given(drawn())
    def check(case):
        learner, batch, config = open_case(policies, case)
        model = learner.policy.peft.eval()
        learner.optimizer.zero_grad()
        loss = oracle_loss(model, case, config, batch)
        loss.backward()
        expected = torch.cat([p.grad.flatten() for p in learner.parameters])
        assert_same(gradient_of(learner, batch), (loss.item(), expected), case.tolerance)

    check()


# ---- how a batch is laid out --------------------------------------------------------------------------------------


def test_neither_cut_nor_order_nor_padding_nor_packing_matters(policies):
    @cases(30)
    @given(
        case=drawn(),
        budget=st.sampled_from([1, 12, 30, 10_000]),
        share=st.booleans(),
        row_cost=st.sampled_from([0, 100, 10**6]),
        padding=st.sampled_from([0, 10**6]),
        data=st.data(),
    )
    def check(case, budget, share, row_cost, padding, data):
        learner, batch, _ = open_case(policies, case)
        learner.share_prompts = False
        want = gradient_of(learner, batch)
        other = permuted(batch, data.draw(st.permutations(range(len(batch.rollouts)))))
        other = regrouped(other, data.draw(st.permutations(range(len(batch.prompts)))))
        learner.share_prompts = share
        learner.training = learner.training.model_copy(update={"micro_batch_tokens": budget})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "TOKEN_COST", row_cost)
            patch.setitem(packing.MICRO_BATCH_COST, "cpu", padding)
            assert_same(gradient_of(learner, other), want, case.tolerance)

    check()


def test_the_size_of_the_vocabularys_tiles_does_not_matter(policies):
    @cases(8)
    @given(case=drawn(), rows=st.integers(1, 9), columns=st.integers(50, 300), elements=st.integers(50, 2000))
    def check(case, rows, columns, elements):
        learner, batch, _ = open_case(policies, case)
        want = gradient_of(learner, batch)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "TILE_ROWS", rows)
            patch.setattr(reference, "TILE_COLUMNS", columns)
            patch.setattr(reference, "CHUNK_ELEMENTS", elements)
            assert_same(gradient_of(learner, batch), want, case.tolerance)

    check()


def test_prompts_that_nobody_answers_change_nothing(policies):
    @cases(10)
    @given(drawn(), st.lists(st.integers(1, 9), min_size=1, max_size=3))
    def check(case, lengths):
        learner, batch, _ = open_case(policies, case)
        more = tuple(np.arange(2, 2 + n) for n in lengths)
        alone = dataclasses.replace(batch, prompts=batch.prompts + more)
        assert_same(gradient_of(learner, alone), gradient_of(learner, batch), 0)

    check()


# ---- what is trained on -------------------------------------------------------------------------------------------


def test_the_prompt_is_context_and_has_no_loss(policies):
    """Where it ends does not matter: its end may as well stand in the completions, as text that nobody sampled."""

    @cases(20)
    @given(drawn(), st.data())
    def check(case, data):
        learner, batch, _ = open_case(policies, case)
        moved = [data.draw(st.integers(0, len(prompt) - 1)) for prompt in batch.prompts]
        prompts = tuple(p[: len(p) - n] for p, n in zip(batch.prompts, moved, strict=True))
        rollouts = tuple(behind(r, batch.prompts[r.group][len(prompts[r.group]) :]) for r in batch.rollouts)
        other = dataclasses.replace(batch, prompts=prompts, rollouts=rollouts)
        assert_same(gradient_of(learner, other), gradient_of(learner, batch), case.tolerance)

    check()


def behind(rollout: Rollout, tokens: np.ndarray) -> Rollout:
    """The rollout with tokens of an environment in front of it."""
    n = len(tokens)
    return dataclasses.replace(
        rollout,
        tokens_T=np.concatenate((tokens, rollout.tokens_T)),
        logprobs_T=np.concatenate((np.zeros(n, np.float32), rollout.logprobs_T)),
        planning_T=np.concatenate((np.zeros(n, bool), rollout.planning_T)),
        sampled_T=np.concatenate((np.zeros(n, bool), sampled(rollout))),
    )


def test_what_an_environment_wrote_is_context_alone(policies):
    """Log-probs and planning of its tokens mean nothing, and it is in no denominator."""

    @cases(20)
    @given(drawn().map(lambda case: dataclasses.replace(case, masked=0.4)), st.integers(0, 2**32 - 1))
    def check(case, seed):
        learner, batch, config = open_case(policies, case)
        rng = np.random.default_rng(seed)
        rollouts = []
        for r in batch.rollouts:
            noise, plan = rng.normal(-3, 2, len(r.tokens_T)).astype(np.float32), rng.random(len(r.tokens_T)) < 0.5
            noise[rng.random(len(noise)) < 0.3] = np.nan
            mask = sampled(r)
            rollouts.append(
                dataclasses.replace(
                    r,
                    logprobs_T=np.where(mask, r.logprobs_T, noise),
                    planning_T=np.where(mask, r.planning_T, plan),
                )
            )
        other = dataclasses.replace(batch, rollouts=tuple(rollouts))
        assert_same(gradient_of(learner, other), gradient_of(learner, batch), 0)
        denominator = packing.loss_denominator(
            batch.rollouts, aggregation=config.loss.aggregation, max_tokens=config.training.max_tokens
        )
        tokens = sum(int(sampled(r).sum()) for r in batch.rollouts)
        count = len(batch.rollouts)
        assert (
            denominator
            == {
                "token_mean": tokens,
                "seq_mean": count,
                "constant": count * config.training.max_tokens,
            }[config.loss.aggregation]
        )

    check()


def test_a_completion_of_no_advantage_still_counts(policies):
    """It has no loss of its own (without KL and entropy bonus), and the others' is divided by more."""

    @cases(20)
    @given(drawn(), st.lists(st.integers(1, 9), min_size=1, max_size=3))
    def check(case, lengths):
        off = {"loss__kl_coef": 0.0, "loss__entropy_coef": 0.0}
        case = dataclasses.replace(case, overrides=case.overrides | off)
        learner, batch, config = open_case(policies, case)
        more = tuple(
            Rollout(0, np.arange(2, 2 + n), np.full(n, -5, np.float32), 0.0, np.arange(n) % 2 == 0) for n in lengths
        )
        fuller = dataclasses.replace(batch, rollouts=batch.rollouts + more)
        loss, gradient = gradient_of(learner, batch)
        shrink = batch.num_tokens / fuller.num_tokens
        if config.loss.aggregation != "token_mean":
            shrink = len(batch.rollouts) / len(fuller.rollouts)
        assert_same(gradient_of(learner, fuller), (loss * shrink, gradient * shrink), case.tolerance)

    check()


# ---- temperature --------------------------------------------------------------------------------------------------


def test_a_temperature_is_a_scale_of_the_head(policies):
    """Log-probs, entropies, reference and gradient at T are those at 1 of a model whose logits are divided by T."""
    policy = policies["llama"]  # its head is a matrix of its own
    own = policy.head.weight.detach().clone()

    @cases(20)
    @given(drawn(), st.floats(0.3, 3))
    def check(case, temperature):
        case = dataclasses.replace(case, seed=KINDS.index("llama"))
        warm = dataclasses.replace(case, overrides=case.overrides | {"training__temperature": temperature})
        flat = dataclasses.replace(case, overrides=case.overrides | {"training__temperature": 1.0})
        learner, batch, _ = open_case(policies, warm)
        want = gradient_of(learner, batch)
        try:
            policy.head.weight.data.copy_(own / temperature)
            got = gradient_of(Learner(policy, flat.config("unused")), batch)
        finally:
            policy.head.weight.data.copy_(own)
        assert_same(got, want, case.tolerance)

    check()
