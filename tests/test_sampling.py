"""The in-process engine: draws follow the softmax, and a completion depends on its prompt and its stream alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import tiny_models as models
from retrain.inference import pytorch
from retrain.inference.pytorch import PyTorchEngine, sample
from retrain.streams import uniforms
from retrain.types import RetrainError

PROMPTS = [np.arange(2, 2 + n) for n in (1, 40, 7)]
STREAMS = np.arange(12, dtype=np.uint64).reshape(3, 4)
LAST = np.nextafter(np.float32(1), np.float32(0))


@pytest.fixture
def engine(open_local):
    def make(kind="qwen3", **options):
        return PyTorchEngine(open_local(kind).policy, **options)

    return make


def generate(engine, prompts=PROMPTS, streams=STREAMS, *, max_tokens=24, temperature=0.9):
    return engine.generate(prompts, streams, max_tokens=max_tokens, temperature=temperature)


def tokens(groups):
    return [completion.tokens_T.tolist() for group in groups for completion in group]


# ---- one draw -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_draws_follow_the_softmax(temperature):
    logits = torch.tensor([0.5, -1.0, 2.0, -torch.inf, 0.0, 1.5])
    noise = torch.from_numpy(uniforms(np.arange(8), 5_000).reshape(-1))
    token, logprob = sample(logits.expand(len(noise), -1), noise, temperature)
    p = torch.softmax(logits.double() / temperature, 0)
    counts = torch.bincount(token, minlength=6).numpy()
    assert counts[3] == 0
    possible = [0, 1, 2, 4, 5]
    assert stats.chisquare(counts[possible], p[possible].numpy() * len(noise)).pvalue > 1e-3
    torch.testing.assert_close(logprob, p.log()[token].float())


def test_draws_are_the_inverse_of_the_cumulative_distribution():
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]] * 6).log()
    noise = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, float(LAST)])
    assert sample(logits, noise, 1.0)[0].tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("impossible", [[0], [5], [0, 1, 4, 5], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("u", [0.0, 1e-30, 0.5, float(LAST)])
def test_a_token_of_probability_zero_is_never_drawn(impossible, u):
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    logits[:, impossible] = -torch.inf
    token, logprob = sample(logits, torch.full((50,), u), 1.0)
    assert not set(token.tolist()) & set(impossible)
    assert logprob.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_extreme_temperatures(temperature):
    logits = torch.randn(400, 50, generator=torch.Generator().manual_seed(1))
    token, logprob = sample(logits, torch.rand(400, generator=torch.Generator().manual_seed(2)), temperature)
    assert logprob.isfinite().all()
    if temperature < 1:
        top = logits.topk(2).values
        clear = top[:, 0] - top[:, 1] > 1e-2
        assert torch.equal(token[clear], logits.argmax(1)[clear])
    else:
        torch.testing.assert_close(logprob, torch.full((400,), -np.log(50), dtype=torch.float32), atol=1e-3, rtol=0)


def test_temperature_zero_takes_the_likeliest_and_reports_its_log_probability():
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(1))
    token, logprob = sample(logits, torch.zeros(20), 0.0)
    assert torch.equal(token, logits.argmax(1))
    torch.testing.assert_close(logprob, logits.log_softmax(1).amax(1))


@given(
    vocabulary=st.sampled_from([2, 9, 127, 4096, 4097, 5000, 12_800]),
    spread=st.floats(0.0, 40.0),
    temperature=st.sampled_from([0.4, 1.0, 1.7]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_draw_inverts_the_cumulative_distribution(vocabulary, spread, temperature, seed):
    """Against float64: the number drawn lies in the token's share of [0, 1), up to float32 rounding."""
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal((16, vocabulary))).astype(np.float32)
    logits[:, rng.random(vocabulary) < 0.3] = -np.inf
    logits[:, seed % vocabulary] = 0.0
    u = rng.random(16, dtype=np.float32)
    u[:2] = 0.0, LAST
    token, logprob = sample(torch.from_numpy(logits), torch.from_numpy(u), temperature)
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    above = p.cumsum(1)[np.arange(16), token]
    own = p[np.arange(16), token]
    assert (own > 0).all()
    rounding = 5e-6 + 2e-7 * np.abs(scaled[np.isfinite(scaled)]).max()
    assert (above - own <= u + rounding).all()
    assert (u <= above + rounding).all()
    np.testing.assert_allclose(logprob, np.log(own), rtol=0, atol=rounding)


def test_a_large_vocabulary_at_the_end_of_the_unit_interval():
    logits = torch.randn(4, 151_936, generator=torch.Generator().manual_seed(1))
    token, logprob = sample(logits, torch.full((4,), float(LAST)), 1.0)
    assert (token < 151_936).all() and logprob.isfinite().all()


# ---- completions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*models.PLAIN, "gemma3-window"])
def test_greedy_is_what_transformers_generates(kind, engine):
    own = engine(kind)
    answers = generate(own, streams=STREAMS[:, :1], temperature=0.0)
    for prompt, (completion,) in zip(PROMPTS, answers, strict=True):
        output = own.policy.lm.generate(
            input_ids=torch.from_numpy(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=list(own.policy.eos_ids),
            pad_token_id=models.PAD,
        )
        assert completion.tokens_T.tolist() == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", [*models.PLAIN, "mistral-window"])
def test_log_probs_are_those_of_a_full_forward_at_the_sampling_temperature(kind, engine):
    own = engine(kind)
    for prompt, group in zip(PROMPTS, generate(own, temperature=0.6), strict=True):
        for completion in group:
            whole = torch.from_numpy(np.concatenate((prompt, completion.tokens_T)))[None]
            with torch.no_grad():
                logits = own.policy.lm(input_ids=whole).logits[0, len(prompt) - 1 : -1]
            want = torch.log_softmax(logits / 0.6, dim=-1).gather(1, torch.from_numpy(completion.tokens_T)[:, None])
            np.testing.assert_allclose(completion.logprobs_T, want[:, 0].numpy(), atol=2e-5)
            assert completion.logprobs_T.dtype == np.float32


@pytest.mark.parametrize("kind", models.PLAIN)
def test_prefix_caching_changes_no_token(kind, engine):
    assert tokens(generate(engine(kind))) == tokens(generate(engine(kind, prefix_caching=False)))


def test_a_completion_depends_on_its_prompt_and_its_stream_alone(engine):
    own = engine()
    together = tokens(generate(own))
    assert len(set(map(tuple, together))) == 12
    for p, g in ((0, 0), (1, 3), (2, 1)):
        (alone,) = tokens(generate(own, [PROMPTS[p]], STREAMS[p : p + 1, g : g + 1]))
        assert alone == together[4 * p + g]
    reversed_ = tokens(generate(own, PROMPTS[::-1], STREAMS[::-1, ::-1]))
    assert reversed_ == together[::-1]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_dropping_ended_rows_changes_nothing(share, engine, monkeypatch):
    # Many ids end a completion here, so that rows end all along.
    own = engine()
    own.policy = dataclasses.replace(own.policy, eos_ids=tuple(range(0, models.VOCAB, 9)))
    usual = generate(own)
    assert len({len(tokens) for tokens in tokens(usual)}) > 3
    monkeypatch.setattr(pytorch, "COMPACT_BELOW", share)
    other = generate(own)
    assert tokens(other) == tokens(usual)
    for a, b in zip((c for g in other for c in g), (c for g in usual for c in g), strict=True):
        np.testing.assert_allclose(a.logprobs_T, b.logprobs_T, atol=1e-5)


def test_a_completion_ends_at_the_first_end_of_sequence_which_it_includes(engine):
    own = engine()
    free = generate(own)
    seen = sorted({token for row in tokens(free) for token in row[3:20:5]})
    ends = (models.EOS, *seen)
    own.policy = dataclasses.replace(own.policy, eos_ids=ends)
    for before, after in zip((c for g in free for c in g), (c for g in generate(own) for c in g), strict=True):
        full = before.tokens_T.tolist()
        cut = next((t + 1 for t, token in enumerate(full) if token in ends), len(full))
        assert after.tokens_T.tolist() == full[:cut]
        assert after.finish_reason == ("stop" if full[cut - 1] in ends else "length")
        assert len(after.logprobs_T) == len(after) == cut


def test_one_token_completions(engine):
    own = engine()
    for group in generate(own, max_tokens=1):
        for completion in group:
            assert len(completion) == 1
            assert completion.finish_reason == ("stop" if completion.tokens_T[0] in own.policy.eos_ids else "length")


def test_text_leaves_special_tokens_out_and_versions_are_stamped(engine):
    own = engine()
    own.publish(7)
    first = generate(own)[0][0]
    assert first.policy_version == 7
    decoded = own._completion(np.array([70, 71, models.EOS]), np.zeros(3, dtype=np.float32))
    assert decoded.text == own.policy.tokenizer.decode([70, 71])
    assert (decoded.finish_reason, len(decoded)) == ("stop", 3)


def test_an_update_shows_once_it_is_published(open_local):
    backend = open_local("qwen3", training__lr=0.1)
    copied, live = PyTorchEngine(backend.policy), PyTorchEngine(backend.policy, merged_copy=False)
    before = tokens(generate(copied))
    assert tokens(generate(live)) == before
    backend.step(models.random_batch(0, [4, 5], [[6, 6], [3, 9]]), 0)
    assert tokens(generate(copied)) == before
    copied.publish(1)
    assert tokens(generate(copied)) == tokens(generate(PyTorchEngine(backend.policy))) != before
    # The very modules that train have nothing to publish.
    assert tokens(generate(live)) == tokens(generate(copied))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_that_has_diverged_is_an_error(kind, open_local):
    policy = open_local(kind).policy
    own = PyTorchEngine(policy)
    with torch.no_grad():
        policy.adapter_parameters()[1].fill_(torch.nan)
    own.publish(1)
    with pytest.raises(RetrainError, match=r"not finite.*earlier checkpoint"):
        generate(own)
