"""Server engines against a real HTTP server on loopback: sampling, publishing, and proof of what is served.

The answers of the "sglang" form follow SGLang's documentation; it could not be installed to compare with.
"""

from __future__ import annotations

import dataclasses
import signal
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models as models
from retrain.inference.dialects import DIALECTS
from retrain.types import ConfigError, RetrainError
from server_rig import FORMS, PROMPTS, STREAMS, TEMPERATURE, expected_tokens, generate, step, tokens

pytest_plugins = "server_fixtures"

# ---- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [TEMPERATURE, 1.0, 0.0])
def test_completions_are_what_the_server_sampled(serve, connect, form, temperature):
    fake = serve(form)
    engine, backend = connect(fake)
    engine.publish(3)
    groups = generate(engine, temperature=temperature)
    (adapter,) = fake.state.adapters.values()
    wanted = expected_tokens(fake, adapter, temperature=temperature)
    assert tokens(groups) == [sampled.tokens for sampled in wanted]
    for completion, sampled in zip([c for group in groups for c in group], wanted, strict=True):
        assert completion.tokens_T.dtype == np.int64
        assert completion.logprobs_T.dtype == np.float32
        np.testing.assert_allclose(completion.logprobs_T, sampled.logprobs, atol=1e-6)
        assert completion.policy_version == engine.policy_version == 3
        assert completion.finish_reason == sampled.reason
        assert completion.text == backend.tokenizer.decode(sampled.tokens, skip_special_tokens=True)


@pytest.mark.parametrize("form", FORMS)
def test_log_probs_are_the_trainers(serve, connect, form):
    engine, backend = connect(serve(form))
    engine.publish(0)
    groups = generate(engine)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            np.testing.assert_allclose(
                c.logprobs_T, backend.logprobs(prompt, c.tokens_T, temperature=TEMPERATURE), atol=1e-5
            )
    learned = step(backend, groups)
    assert learned.metrics["logprob_gap_max"] < 1e-5


def test_a_completion_depends_on_its_prompt_and_stream_alone(serve, connect):
    engine, _ = connect(serve())
    engine.publish(0)
    together = generate(engine)
    alone = [generate(engine, [prompt], streams[None]) for prompt, streams in zip(PROMPTS, STREAMS, strict=True)]
    assert tokens(together) == [t for group in alone for t in tokens(group)]
    swapped = generate(engine, PROMPTS[::-1], STREAMS[::-1])
    assert tokens(swapped[::-1]) == tokens(together)


def test_end_of_sequence_is_part_of_the_completion(serve, connect):
    engine, _ = connect(serve())
    groups = generate(engine, [PROMPTS[0]], np.arange(32, dtype=np.uint64)[None], max_tokens=32, temperature=3.0)
    ended = [c for c in groups[0] if c.finish_reason == "stop"]
    assert ended
    assert all(c.tokens_T.tolist().index(models.EOS) == len(c) - 1 for c in ended)
    assert all(len(c) == 32 for c in groups[0] if c.finish_reason == "length")


def test_before_anything_is_published_the_base_is_served(serve, connect):
    fake = serve()
    engine, _ = connect(fake)
    groups = generate(engine)
    assert tokens(groups) == [sampled.tokens for sampled in expected_tokens(fake, fake.model)]
    assert groups[0][0].policy_version == 0


def test_requests_are_bounded(serve, connect, monkeypatch):
    monkeypatch.setitem(DIALECTS, "vllm", dataclasses.replace(DIALECTS["vllm"], concurrent=3))
    fake = serve(delay=0.005)
    engine, _ = connect(fake)
    generate(engine)
    assert 2 <= fake.most_at_once <= 3


# ---- publishing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_run_of_steps(serve, connect, tmp_path, form):
    """Each version is served, confirmed, and the one before it is gone: from the server and from the disk."""
    fake = serve(form)
    engine, backend = connect(fake, stir=False)
    engine.publish(0)
    seen = []
    for version in range(1, 4):
        groups = generate(engine)
        learned = step(backend, groups, number=version - 1)
        assert learned.metrics["logprob_gap_max"] < 1e-4
        engine.publish(version)
        seen.append(tokens(groups))
        assert [name.rpartition("-v")[2] for name in fake.state.adapters] == [str(version)]
        (run,) = (tmp_path / "adapters").iterdir()
        assert [folder.name for folder in run.iterdir()] == [f"v{version}"]
    assert all(c.policy_version == 3 for group in generate(engine) for c in group)
    engine.close()
    assert not fake.state.adapters
    assert not list((tmp_path / "adapters").iterdir())


def test_what_is_published_is_a_plain_peft_adapter(serve, connect, model_folder, tmp_path):
    engine, backend = connect(serve())
    engine.publish(7)
    (folder,) = (tmp_path / "adapters").glob("*/v7")
    peft = models.load_with_peft(model_folder("qwen3"), folder)
    batch = models.random_batch(0, [9], [[5]])
    (expected,) = models.separate_logprobs(peft, batch, 1.0)
    got = backend.logprobs(batch.prompts[0], batch.rollouts[0].tokens_T)
    wanted = expected.gather(1, torch.from_numpy(batch.rollouts[0].tokens_T)[:, None]).squeeze(1)
    np.testing.assert_allclose(got, wanted.detach().numpy(), atol=1e-5)


def test_the_version_that_is_served_is_not_published_again(serve, connect):
    fake = serve()
    engine, _ = connect(fake)
    engine.publish(2)
    before = len(fake.log)
    engine.publish(2)
    assert len(fake.log) == before


def test_two_runs_do_not_meet(serve, connect):
    """Same server, same folder, same version: another adapter each."""
    fake = serve()
    one, first = connect(fake)
    two, second = connect(fake)
    models.stir(second.policy.peft)
    one.publish(1)
    two.publish(1)
    assert len(fake.state.adapters) == 2
    a, b = generate(one), generate(two)
    assert tokens(a) != tokens(b)
    step(first, a)
    assert step(second, b).metrics["logprob_gap_max"] < 1e-4
    one.close()
    assert len(fake.state.adapters) == 1
    assert tokens(generate(two)) == tokens(b)


@pytest.mark.parametrize("form", FORMS)
def test_a_server_that_keeps_the_old_adapter_is_caught_in_the_first_step(serve, connect, form):
    fake = serve(form, stale=True)
    engine, backend = connect(fake, stir=False)
    engine.publish(0)
    step(backend, generate(engine))
    with pytest.raises(RetrainError, match=rf"{fake.url} did not take up policy version 1.*moved by up to") as caught:
        engine.publish(1)
    assert not isinstance(caught.value, ConfigError)
    assert engine.policy_version == 0
    assert all(c.policy_version == 0 for group in generate(engine) for c in group)
    engine.close()
    assert not fake.state.adapters


def test_small_steps_of_a_server_that_keeps_the_old_adapter_add_up(serve, connect):
    engine, backend = connect(serve(stale=True))
    engine.publish(0)
    with pytest.raises(RetrainError, match="did not take up policy version") as caught:
        for version in range(1, 60):
            models.stir(backend.policy.peft, 1e-7)
            engine.publish(version)
    assert "policy version 1," not in str(caught.value)


def test_an_update_that_moved_nothing_is_no_reason_to_complain(serve, connect):
    engine, _ = connect(serve(stale=True))
    for version in range(4):
        engine.publish(version)
    assert engine.policy_version == 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lie", [-0.01, 0.005])
def test_a_server_that_lies_about_log_probs_is_caught_in_the_first_step(serve, connect, form, lie):
    with pytest.raises(ConfigError, match=r"its log-probabilities of what it samples differ|no log-probability"):
        connect(serve(form, lie=lie), retries=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_server_that_begins_to_lie_is_caught_at_the_next_publication(serve, connect, form):
    fake = serve(form)
    engine, _ = connect(fake, retries=0)
    fake.lie = 0.005
    with pytest.raises(ConfigError, match=r"misreports what it samples"):
        engine.publish(0)


@pytest.mark.parametrize(
    "form, remedy", [("vllm", "--logprobs-mode processed_logprobs"), ("sglang", "SGLANG_RETURN_ORIGINAL_LOGPROB")]
)
def test_log_probs_before_temperature_are_told_from_others(serve, connect, form, remedy):
    engine, _ = connect(serve(form, raw_logprobs=True))
    with pytest.raises(ConfigError, match=rf"at temperature 1, not at training.temperature = 0.8.*{remedy}"):
        engine.publish(0)


def test_at_temperature_1_they_are_the_same(serve, connect):
    engine, _ = connect(serve(raw_logprobs=True), temperature=1.0)
    engine.publish(0)


@pytest.mark.parametrize("form", FORMS)
def test_a_prefix_cache_that_outlives_the_adapter_is_caught(serve, connect, form):
    """It scores with the new adapter and samples with the old one's cache."""
    engine, backend = connect(serve(form, old_cache=True), stir=False)
    engine.publish(0)
    models.stir(backend.policy.peft)
    with pytest.raises(RetrainError, match="prefix cache has outlived the adapter"):
        engine.publish(1)


def test_another_model_of_the_same_tokenizer_is_told_by_its_log_probs(serve, connect):
    fake = serve(kind="llama", name="something-else")
    with pytest.raises(ConfigError, match=rf"{fake.url} does not serve .*another model \(it calls it something-else\)"):
        connect(fake)


# ---- several servers ------------------------------------------------------------------------------------------------


def test_requests_are_spread_and_every_server_gets_every_version(serve, connect):
    fakes = [serve() for _ in range(3)]
    engine, backend = connect(*fakes)
    engine.publish(0)
    single, _ = connect(serve())
    single.publish(0)
    prompts, streams = PROMPTS * 4, np.arange(48, dtype=np.uint64).reshape(12, 4)
    before = [len(fake.completions()) for fake in fakes]
    groups = generate(engine, prompts, streams, max_tokens=3)
    assert tokens(groups) == tokens(generate(single, prompts, streams, max_tokens=3))
    asked = [fake.completions()[n:] for fake, n in zip(fakes, before, strict=True)]
    assert sum(map(len, asked)) == 48
    assert all(len(requests) >= 8 for requests in asked)
    # A group's completions go to one server, which computes the prompt once.
    seeds = [{request.body["seed"] for request in requests} for requests in asked]
    assert all(any(set(group.tolist()) <= served for served in seeds) for group in streams)
    models.stir(backend.policy.peft)
    engine.publish(1)
    assert [[name[-2:] for name in fake.state.adapters] for fake in fakes] == [["v1"]] * 3


def test_a_group_is_split_where_servers_would_stand_idle(serve, connect):
    fakes = [serve() for _ in range(3)]
    engine, _ = connect(*fakes)
    before = [len(fake.completions()) for fake in fakes]
    generate(engine, PROMPTS[:1], np.arange(7, dtype=np.uint64)[None])
    after = [len(fake.completions()) for fake in fakes]
    assert sorted(b - a for a, b in zip(before, after, strict=True)) == [1, 3, 3]


def test_one_stale_server_among_several_is_named(serve, connect):
    good, bad = serve(), serve(stale=True)
    engine, backend = connect(good, bad)
    engine.publish(0)
    models.stir(backend.policy.peft)
    with pytest.raises(RetrainError, match=f"{bad.url} did not take up"):
        engine.publish(1)


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------


def test_a_signal_ends_sampling_at_once(serve, connect):
    class Signalled(KeyboardInterrupt):
        pass

    def handler(number, frame):
        raise Signalled

    fake = serve()
    engine, _ = connect(fake)
    engine.publish(0)
    fake.fault = lambda request: "stall"
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        began = time.monotonic()
        with pytest.raises(Signalled):
            generate(engine)
        assert time.monotonic() - began < 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    fake.fault = lambda request: None
    assert len(tokens(generate(engine))) == 12


# ---- the trainer's own log-probs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", models.PLAIN)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_backend_log_probs_are_those_of_plain_transformers(open_local, kind, temperature):
    backend = open_local(kind)
    backend.policy.peft.train()
    batch = models.random_batch(1, [1, 40], [[1, 9], [17]])
    expected = models.separate_logprobs(backend.policy.peft.eval(), batch, temperature)
    for rollout, wanted in zip(batch.rollouts, expected, strict=True):
        got = backend.logprobs(batch.prompts[rollout.group], rollout.tokens_T, temperature=temperature)
        assert got.dtype == np.float32
        chosen = wanted.gather(1, torch.from_numpy(rollout.tokens_T)[:, None]).squeeze(1)
        np.testing.assert_allclose(got, chosen.detach().numpy(), atol=1e-5)


def test_backend_log_probs_without_the_adapter_are_those_of_the_base(open_local, model_folder):
    """Against the base loaded afresh; the adapter is on again afterwards."""
    backend = open_local(stir=True)
    batch = models.random_batch(1, [40], [[9]])
    prompt, tokens = batch.prompts[0], batch.rollouts[0].tokens_T
    policy = backend.logprobs(prompt, tokens)
    base = AutoModelForCausalLM.from_pretrained(model_folder("qwen3"), dtype=torch.float32)
    (expected,) = models.separate_logprobs(base, batch, 1.0)
    chosen = expected.gather(1, torch.from_numpy(tokens)[:, None]).squeeze(1)
    got = backend.logprobs(prompt, tokens, adapter=False)
    np.testing.assert_allclose(got, chosen.detach().numpy(), atol=1e-5)
    assert np.abs(got - policy).max() > 1e-3
    np.testing.assert_array_equal(policy, backend.logprobs(prompt, tokens))


def test_backend_log_probs_are_of_the_policy_in_eval_mode(open_local):
    backend = open_local(lora__dropout=0.5)
    prompt, completion = np.arange(2, 12), np.arange(20, 25)
    backend.policy.peft.train()
    first = backend.logprobs(prompt, completion)
    np.testing.assert_array_equal(first, backend.logprobs(prompt, completion))
