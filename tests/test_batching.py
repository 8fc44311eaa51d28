"""From sampled prompts to the batch that trains: filtering, dynamic sampling, reward errors, overlong shaping."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import oracle
from retrain.config.build import build
from retrain.streams import stream_key
from retrain.training.batching import credit, shaped_rewards
from retrain.training.collect import Collector
from retrain.training.rollouts import Answers
from retrain.training.stopwatch import Stopwatch
from retrain.types import Completion, Example, Group, RetrainError, Score


def completion(length, text="", version=0):
    tokens = np.arange(length, dtype=np.int64)
    return Completion(tokens, -np.ones(length, dtype=np.float32), "stop", version, text)


def group(index, rewards, lengths=None):
    lengths = lengths or range(1, len(rewards) + 1)
    completions = tuple(completion(length) for length in lengths)
    errors = tuple("timed out" if reward is None else None for reward in rewards)
    return Group(index, Example(f"p{index}", "r"), np.arange(index + 1), completions, tuple(rewards), errors)


def credited(groups, *, max_tokens=10, sepa_lambda=0.25, **algorithm):
    section = build({}, overrides={f"algorithm.{key}": value for key, value in algorithm.items()}).algorithm
    return credit(
        groups,
        section,
        max_tokens=max_tokens,
        detect=lambda completions: [tokens % 2 == 1 for tokens in completions],
        sepa_lambda=sepa_lambda,
    )


def test_informative_groups_are_trained_on_with_their_advantages():
    groups = [group(4, [1.0, 1.0]), group(5, [1.0, 0.0, 0.0]), group(6, [0.0, 0.0]), group(7, [0.0, 1.0])]
    got = credited(groups, advantage_mode="rloo")
    want = oracle.episode_advantages([1.0, 0.0, 0.0, 0.0, 1.0], [0, 0, 0, 1, 1], [1, 2, 3, 1, 2], "rloo")
    assert got.advantages_PG[0] == got.advantages_PG[2] == [0.0, 0.0]
    assert got.members == [(1, 0), (1, 1), (1, 2), (3, 0), (3, 1)]
    assert [r.advantage for r in got.batch.rollouts] == pytest.approx(want)
    assert [len(prompt) for prompt in got.batch.prompts] == [6, 8]
    assert [r.group for r in got.batch.rollouts] == [0, 0, 0, 1, 1]
    for (p, g), rollout in zip(got.members, got.batch.rollouts, strict=True):
        source = groups[p].completions[g]
        assert rollout.tokens_T is source.tokens_T and rollout.logprobs_T is source.logprobs_T
        assert rollout.planning_T.tolist() == [bool(t % 2) for t in source.tokens_T]
    assert got.batch.sepa_lambda == 0.25
    assert got.batch.num_tokens == 1 + 2 + 3 + 1 + 2


def test_uniform_groups_can_be_kept_and_then_count_in_the_denominator():
    got = credited([group(0, [1.0, 1.0]), group(1, [1.0, 0.0])], skip_uniform_groups=False, advantage_mode="grpo")
    assert got.members == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [r.advantage for r in got.batch.rollouts[:2]] == [0.0, 0.0]
    assert got.batch.num_tokens == 6


def test_a_failed_reward_leaves_its_group_and_is_not_a_zero():
    got = credited([group(0, [1.0, None, 0.0]), group(1, [1.0, None])], advantage_mode="dr_grpo")
    assert got.advantages_PG == [[0.5, None, -0.5], [None, None]]
    assert got.members == [(0, 0), (0, 2)]


@pytest.mark.parametrize("skip", [True, False])
def test_nothing_to_train_on(skip):
    got = credited([group(0, [None, None]), group(1, [1.0, None])], skip_uniform_groups=skip)
    assert (got.members, got.batch.rollouts, got.batch.num_tokens) == ([], (), 0)


def test_the_overlong_penalty_is_added_before_groups_are_compared():
    same = group(0, [1.0, 1.0, None, 1.0], lengths=[6, 8, 9, 10])
    assert shaped_rewards(same, overlong_buffer=4, max_tokens=10) == pytest.approx([1.0, 0.5, None, 0.0])
    assert shaped_rewards(same, overlong_buffer=0, max_tokens=10) == [1.0, 1.0, None, 1.0]
    got = credited([same], overlong_buffer=4, advantage_mode="dr_grpo")
    assert [r.advantage for r in got.batch.rollouts] == pytest.approx([0.5, 0.0, -0.5])
    assert credited([same], advantage_mode="dr_grpo").batch.rollouts == ()


# ---- collecting ---------------------------------------------------------------------------------------------------


class Engine:
    """Answers with the name of the prompt; remembers what it was asked."""

    def __init__(self, version=0):
        self.policy_version, self.asked = version, []

    def generate(self, prompts, streams_PG, *, max_tokens, temperature):
        self.asked.append((prompts, streams_PG, max_tokens, temperature))
        return [
            tuple(completion(2, f"{prompt[0]}:{g}", self.policy_version) for g in range(streams_PG.shape[1]))
            for prompt in prompts
        ]


class Scorer:
    """Prompts divisible by 3 are solved by their first completion only, the rest by all; a sixth fails to score."""

    def figures(self):
        return {}

    def score(self, responses, references, prompts):
        assert prompts == [f"p{reference[1:]}" for reference in references]
        scores = []
        for response, reference in zip(responses, references, strict=True):
            prompt, g = map(int, response.split(":"))
            assert reference == f"r{prompt}"
            failed = (prompt, g) == (6, 1)
            scores.append(Score(None, "timed out") if failed else Score(float(g == 0 or prompt % 3 != 0)))
        return scores


@pytest.fixture
def collector():
    def make(engine=None, **overrides):
        values = {"training.batch_size": 4, "training.group_size": 3, "training.max_tokens": 50, "data.shuffle": False}
        config = build({}, overrides=values | {key.replace("__", "."): value for key, value in overrides.items()})
        examples = [Example(f"p{i}", f"r{i}") for i in range(20)]
        prompts = [np.array([i]) for i in range(20)]
        rollouts = Answers(examples, prompts, engine or Engine(), Scorer(), config.training.max_tokens)
        return Collector(rollouts, 9, config.training, config.algorithm, config.data)

    return make


def collect(collector, first=0, version=0):
    return collector.collect(5, first, version, Stopwatch(), collector.training.batch_size)


def test_a_step_samples_the_next_prompts_with_streams_of_their_own(collector):
    own = collector(training__temperature=0.6)
    got = collect(own, first=18)
    assert [g.index for g in got.sampled] == [18, 19, 20, 21]
    assert [g.example.prompt for g in got.sampled] == ["p18", "p19", "p0", "p1"]
    assert got.prompts_used == 22
    ((prompts, streams, max_tokens, temperature),) = own.rollouts.engine.asked
    assert [prompt[0] for prompt in prompts] == [18, 19, 0, 1]
    assert streams.tolist() == [[stream_key(9, "sample", 5, i, g) for g in range(3)] for i in (18, 19, 20, 21)]
    assert (max_tokens, temperature) == (50, 0.6)


def test_rewards_and_errors_go_to_their_completions(collector):
    got = collect(collector(), first=5)
    assert [g.rewards_G for g in got.groups] == [(1.0, 1.0, 1.0), (1.0, None, 0.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)]
    assert got.groups[1].errors_G == (None, "timed out", None)
    assert [c.text for c in got.groups[1].completions] == ["6:0", "6:1", "6:2"]


def test_dynamic_sampling_goes_on_until_enough_groups_are_informative(collector):
    own = collector(algorithm__dynamic_sampling=True, algorithm__max_resample_rounds=10)
    got = collect(own)
    assert [g.index for g in got.groups] == [0, 3, 6, 9]
    assert len(own.rollouts.engine.asked) > 2
    assert sorted(g.index for g in got.sampled) == list(range(got.prompts_used))
    # What a round asks for is what is still missing.
    assert [len(prompts) for prompts, *_ in own.rollouts.engine.asked[:2]] == [4, 2]


def test_dynamic_sampling_ends_after_its_rounds(collector):
    own = collector(algorithm__dynamic_sampling=True, algorithm__max_resample_rounds=1)
    got = collect(own, first=1)
    assert len(own.rollouts.engine.asked) == 2
    assert [g.index for g in got.groups] == [3, 6]
    assert got.prompts_used == 1 + 4 + 3


def test_dynamic_sampling_looks_at_the_shaped_rewards(collector, monkeypatch):
    # All of group 1 is right, but one of its completions runs into the overlong buffer.
    own = collector(
        algorithm__dynamic_sampling=True, algorithm__overlong_buffer=10, algorithm__advantage_mode="grpo",
        training__batch_size=1,
    )  # fmt: skip
    answer = own.rollouts.engine.generate

    def longer(*args, **kwargs):
        return [(dataclasses.replace(first, tokens_T=np.arange(45)), *rest) for first, *rest in answer(*args, **kwargs)]

    monkeypatch.setattr(own.rollouts.engine, "generate", longer)
    assert [g.index for g in collect(own, first=1).groups] == [1]


def test_completions_of_another_policy_version_are_refused(collector):
    with pytest.raises(RetrainError, match="policy version 3, version 4 was asked for"):
        collect(collector(Engine(version=3)), version=4)
