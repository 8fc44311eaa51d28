"""credit.jsonl: which completions are recorded, and that their tokens and numbers are the learner's."""

from __future__ import annotations

import numpy as np
import pytest

import oracle
from retrain.assets import resolve_model
from retrain.planning.offsets import TokenOffsets
from retrain.training.batching import Credited
from retrain.training.credit_samples import choose, no_credit_rows, open_credit_rows, token_texts
from retrain.types import Batch, Completion, Example, Group, Rollout, StepResult


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model("builtin:tiny"))


def test_the_most_telling_come_first():
    """Groups: 0 all wrong, 1 mixed, 2 has one member only, 3 mixed with a reward that failed."""
    rewards = [[0.0, 0.0], [0.0, 1.0, 0.5, 1.0], [1.0, None], [0.0, None, 1.0]]
    members = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (3, 0), (3, 2)]
    order = [(1, 1), (1, 0), (3, 2), (3, 0), (0, 0), (2, 0)]
    for count in range(8):
        assert [members[place] for place in choose(members, rewards, count)] == order[:count]
    assert choose([], [], 2) == []


@pytest.mark.parametrize("text", ["Let me check: 7+8=15", "naïve 🙂 日本語 end", ""])
def test_texts_of_tokens_join_to_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(ids, TokenOffsets(tokenizer))
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_special_token_goes_by_its_name(tokenizer):
    ids = [*tokenizer("7", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert token_texts(ids, TokenOffsets(tokenizer)) == ["7", tokenizer.eos_token]


def one_group(tokenizer, sampled):
    tokens = np.array(tokenizer("12 plus 30", add_special_tokens=False)["input_ids"])
    completion = Completion(tokens, np.zeros(len(tokens)), "stop", 0, "12 plus 30")
    group = Group(7, Example("2 + 3?", "5"), np.arange(3), (completion,), (1.0,), (None,), ((),))
    planning = np.zeros(len(tokens), dtype=bool)
    planning[:2] = True
    mask = np.array([i not in sampled for i in range(len(tokens))])
    rollout = Rollout(0, tokens, np.zeros(len(tokens)), 0.5, planning, mask)
    return group, Credited([[0.5]], Batch((np.arange(3),), (rollout,), 0.25), [(0, 0)]), int(mask.sum())


def test_tokens_of_an_environment_have_no_credit(tokenizer):
    group, credited, trained = one_group(tokenizer, sampled=(1, 2))
    advantages = np.linspace(0.123456, 1, trained).astype(np.float32)
    learned = StepResult({}, ((0.0, 0.0),), ((advantages, advantages / 3),))
    (row,) = open_credit_rows(tokenizer, 2)(4, [group], credited, learned)
    assert (row["step"], row["prompt_index"], row["advantage"], row["sepa_lambda"]) == (4, 7, 0.5, 0.25)
    assert row["planning"] == [0]
    assert [place for place, value in enumerate(row["advantages"]) if value is None] == [1, 2]
    assert row["advantages"][0] == 0.1235, "four significant digits"
    known = [value for value in row["uncertainty"] if value is not None]
    np.testing.assert_allclose(known, advantages / 3, rtol=1e-3)
    assert len(row["tokens"]) == len(row["advantages"]) == len(row["uncertainty"])


def test_nothing_is_recorded_where_nothing_was_trained_or_wanted(tokenizer):
    group, credited, _ = one_group(tokenizer, sampled=())
    assert open_credit_rows(tokenizer, 2)(1, [group], credited, StepResult()) == []
    assert open_credit_rows(tokenizer, 0) is no_credit_rows


def test_the_learner_reports_the_credit_it_trains_with(open_local):
    """Against the transform as plain loops, over several micro-batches and orders of packing."""
    rng = np.random.default_rng(0)
    lengths = (5, 9, 3, 7)
    rollouts = tuple(
        Rollout(i // 2, rng.integers(0, 50, size), -rng.random(size), advantage, rng.random(size) < 0.3)
        for i, (size, advantage) in enumerate(zip(lengths, (1.0, -0.5, 0.25, -2.0), strict=True))
    )
    batch = Batch((np.arange(4), np.arange(6)), rollouts, sepa_lambda=0.5)
    backend = open_local(
        algorithm__transform_mode="gtpo_sepa_hicra", training__micro_batch_tokens=16, training__lr=1e-4
    )
    learned = backend.step(batch, 0)
    assert [len(advantages) for advantages, _ in learned.credit] == list(lengths)
    for rollout, (advantages, uncertainty), (mean, peak) in zip(
        rollouts, learned.credit, learned.uncertainty, strict=True
    ):
        assert advantages.dtype == uncertainty.dtype == np.float32
        np.testing.assert_allclose([uncertainty.mean(), uncertainty.max()], [mean, peak], rtol=1e-5)
        expected = oracle.token_advantages(
            rollout.advantage, uncertainty.tolist(), rollout.planning_T.tolist(), "gtpo_sepa_hicra", sepa_lambda=0.5
        )
        np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-6)
