"""A step that cannot be made: taken back where a number is not finite, done again where memory does not suffice."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models as models
from retrain.backend import rng
from retrain.backend.devices import is_out_of_memory
from retrain.backend.model import Policy
from retrain.types import Batch, RetrainError
from runs import environment

PROMPTS, COMPLETIONS = [3, 11, 6], [[5, 1, 9, 2], [4, 4, 12], [7, 3]]
TWICE = {"loss__epochs": 2, "loss__minibatches": 2, "loss__old_logprobs": "recompute", "loss__kind": "ppo"}


def batch_of(seed=2):
    return models.random_batch(seed, PROMPTS, COMPLETIONS)


def changed(batch: Batch, place: int, **fields) -> Batch:
    rollouts = list(batch.rollouts)
    rollouts[place] = dataclasses.replace(rollouts[place], **fields)
    return dataclasses.replace(batch, rollouts=tuple(rollouts))


def state(backend) -> list:
    """Weights, optimizer and random generators, flat."""
    inner = backend.learner.optimizer.state_dict()["state"]
    numbers, generators = rng.capture()
    tensors = [*backend.learner.parameters, *(v for values in inner.values() for v in values.values())]
    return [[t.detach().clone() for t in (*tensors, *generators.values())], numbers]


def same(a: list, b: list) -> bool:
    return a[1] == b[1] and len(a[0]) == len(b[0]) and all(map(torch.equal, a[0], b[0]))


# ---- what is not finite -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, TWICE], ids=["one update", "four updates"])
@pytest.mark.parametrize("place", [1, 4])
def test_the_step_is_taken_back_and_the_culprit_named(open_local, overrides, place):
    """The advantage makes the gradient of one completion overflow. Of two mini-batches, 1 is in the second."""
    backend = open_local("gpt2", lora__dropout=0.2, **overrides)
    backend.step(batch_of(1), 0)
    before = state(backend)
    result = backend.step(changed(batch_of(), place, advantage=3e38), 1)
    assert result.skipped in ("loss", "gradient")
    assert result.culprits == (place,)
    assert (result.uncertainty, result.credit) == ((), ())
    assert set(result.metrics) == {"lr", "micro_batch_tokens"}
    assert same(state(backend), before)
    assert all(p.grad is None for p in backend.learner.parameters)
    assert not backend.policy.peft.training


def test_where_only_the_sum_overflows_all_are_named(open_local):
    backend = open_local("gpt2", loss__aggregation="constant", training__max_tokens=1)
    batch = models.random_batch(3, [4], [[1, 1, 1]])
    with torch.no_grad():
        dists = models.separate_logprobs(backend.policy.lm, batch, 0.8)
    on_policy = [np.array([d[0, r.tokens_T[0]].item()]) for d, r in zip(dists, batch.rollouts, strict=True)]
    batch = models.with_logprobs(batch, on_policy)
    # Each is 2.4e38 of the largest number, 3.4e38; the loss divides by 3 only after the sum.
    rollouts = tuple(dataclasses.replace(r, advantage=-2.4e38) for r in batch.rollouts)
    result = backend.step(dataclasses.replace(batch, rollouts=rollouts), 0)
    assert result.skipped == "loss"
    assert result.culprits == (0, 1, 2)


def test_log_probabilities_that_are_not_finite(open_local):
    backend = open_local("gpt2")
    with torch.no_grad():
        backend.learner.parameters[0].fill_(math.nan)
    result = backend.step(batch_of(), 0)
    assert (result.skipped, result.culprits) == ("log-probabilities", tuple(range(9)))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_the_samplers_log_probabilities(open_local, value):
    backend = open_local("gpt2")
    logprobs = batch_of().rollouts[3].logprobs_T.copy()
    logprobs[0] = value
    before = state(backend)
    result = backend.step(changed(batch_of(), 3, logprobs_T=logprobs), 0)
    assert (result.skipped, result.culprits) == ("sampler's log-probabilities", (3,))
    assert same(state(backend), before)


@pytest.mark.parametrize("overrides", [{}, TWICE], ids=["one update", "four updates"])
def test_after_a_skipped_step_the_run_is_as_if_it_had_not_been(open_local, overrides):
    states = []
    for bad in (False, True):
        backend = open_local("llama", lora__dropout=0.2, **overrides)
        backend.step(batch_of(1), 0)
        if bad:
            assert backend.step(changed(batch_of(), 1, advantage=-3e38), 1).skipped
        backend.step(batch_of(3), 2)
        states.append(state(backend))
    assert same(*states)


def test_another_error_takes_the_step_back_as_well(open_local, monkeypatch):
    backend = open_local("gpt2", lora__dropout=0.2, **TWICE)
    calls = failing_on(monkeypatch, lambda call, tokens: ValueError("a bug") if call == 4 else None)
    before = state(backend)
    with pytest.raises(ValueError, match="a bug"):
        backend.step(batch_of(), 0)
    assert calls[0] == 4
    assert same(state(backend), before)


# ---- memory -------------------------------------------------------------------------------------------------------


def failing_on(monkeypatch, error_of):
    """Policy.hidden raises error_of(number of the call from 1, its tokens), where that is one."""
    hidden, calls = Policy.hidden, [0]

    def failing(self, tokens_RS, *rest):
        calls[0] += 1
        error = error_of(calls[0], tokens_RS.numel())
        if error is not None:
            raise error
        return hidden(self, tokens_RS, *rest)

    monkeypatch.setattr(Policy, "hidden", failing)
    return calls


def no_memory(room):
    return lambda call, tokens: torch.OutOfMemoryError("CUDA out of memory.") if tokens > room else None


@pytest.mark.parametrize(
    "overrides",
    [{}, TWICE, {"loss__kl_coef": 0.1}, {"training__gradient_checkpointing": True}],
    ids=["one update", "four updates", "reference pass", "checkpointing"],
)
def test_the_step_is_that_of_a_smaller_budget_bit_for_bit(open_local, monkeypatch, overrides):
    overrides = {"lora__dropout": 0.3, **overrides}
    small = open_local("qwen3", **overrides)
    small.step(batch_of(1), 0)
    failing_on(monkeypatch, no_memory(30))
    result = small.step(batch_of(), 1)
    fits = result.metrics["micro_batch_tokens"]
    assert fits is not None and fits <= 30
    monkeypatch.undo()
    start = open_local("qwen3", **overrides)
    start.step(batch_of(1), 0)
    start.learner.training = start.learner.training.model_copy(update={"micro_batch_tokens": fits})
    expected = start.step(batch_of(), 1)
    assert expected.metrics == result.metrics
    assert expected.uncertainty == result.uncertainty
    assert same(state(start), state(small))
    assert small.step(batch_of(3), 2).metrics["micro_batch_tokens"] == fits, "for the rest of the run"


@settings(max_examples=8, deadline=None)
@given(room=st.integers(23, 90), call=st.integers(1, 6))
def test_wherever_it_runs_out_the_loss_is_the_same(backend_in_float64, room, call):
    """The widest sequence has 23 tokens: with room for it, the loss is that of the whole batch at once."""
    learner = backend_in_float64.learner
    whole = learner.training.model_copy(update={"micro_batch_tokens": 16384})
    learner.training = whole
    expected = backend_in_float64.step(batch_of(), 0).metrics["loss"]
    with pytest.MonkeyPatch.context() as patch:
        failing_on(patch, lambda n, tokens: MemoryError() if n >= call and tokens > room else None)
        learner.training = whole
        assert backend_in_float64.step(batch_of(), 0).metrics["loss"] == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def backend_in_float64(tmp_path_factory):
    from retrain.backend.learner import Learner
    from retrain.backend.local import LocalBackend

    folder = models.save_model("gpt2", tmp_path_factory.mktemp("gpt2"))
    config = models.config_for(folder, training__lr=0.0)
    backend = LocalBackend(config, seed=0, say=lambda line: None)
    models.stir(backend.policy.peft)
    models.in_float64(backend.policy.peft)
    backend.learner = Learner(backend.policy, config)
    return backend


def test_one_sequence_that_does_not_fit_ends_with_what_to_change(open_local, monkeypatch):
    backend = open_local("qwen3", lora__dropout=0.3, **TWICE)
    failing_on(monkeypatch, no_memory(20))
    before = state(backend)
    with pytest.raises(RetrainError, match=r"one sequence of 2\d tokens does not fit.*training\.max_tokens \(now 16\)"):
        backend.step(batch_of(), 0)
    assert same(state(backend), before)


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(10**15)
    with pytest.raises(MemoryError) as array:
        np.empty(10**15)
    assert is_out_of_memory(cpu.value)
    assert is_out_of_memory(array.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(OSError("out of memory"))


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space")
def test_memory_that_really_runs_out():
    """A process with 32 MiB left: the allocator refuses, and the step is that of the budget that was found."""
    script = Path(__file__).parent / "out_of_memory.py"
    done = subprocess.run(
        [sys.executable, script, "32"], capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    budget, found, expected = done.stdout.split()
    assert 16 <= int(budget) < 16384
    assert found == expected
