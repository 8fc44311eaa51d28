"""What a step's rewards say, and that every promised key stands in the first line of metrics.jsonl."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from retrain.config.build import build
from retrain.training.checkpoint import TrainerState
from retrain.training.collect import Collected
from retrain.training.folder import GENERATIONS, METRICS, RunFolder
from retrain.training.metrics import MEASURED, generation_rows, summarize
from retrain.training.records import rows
from retrain.types import Completion, Example, Group, StepResult

# What users were promised of metrics.jsonl, written out by hand: scripts read these names.
PROMISED = {
    "step", "condition", "loss", "grad_norm", "lr", "mean_reward", "correct_rate", "running_correct_rate",
    "reward_errors", "groups_all_correct", "groups_all_wrong", "num_datums", "completion_tokens",
    "max_token_hit_rate", "uncertainty", "entropy_mean", "exec_entropy_mean", "exec_entropy_var",
    "plan_entropy_mean", "plan_entropy_var", "planning_fraction", "sepa_lambda", "sepa_gate_open",
    "logprob_gap_mean", "logprob_gap_max", "ratio_mean", "clip_fraction", "policy_version", "batch_size",
    "group_size", "bp_action", "bp_regime", "bp_p_star", "bp_sigma", "bp_kappa", "bp_throughput",
    "sample_time_s", "reward_time_s", "train_time_s", "sync_time_s", "step_time_s", "tokens_per_s",
    "peak_memory_bytes", "world_size",
}  # fmt: skip


def completion(length=3, finish="stop", text="so 5"):
    return Completion(np.arange(length), np.zeros(length, np.float32), finish, 0, text)


def group(*rewards, index=0, completions=None):
    completions = completions or tuple(completion() for _ in rewards)
    errors = tuple("timed out" if reward is None else None for reward in rewards)
    return Group(index, Example("2 + 3?", "5"), np.arange(4), completions, rewards, errors)


# ---------------------------------------------------------------- summary


def test_summary_by_hand():
    summary = summarize(
        [
            group(1.0, 1.0, 1.0),  # all right
            group(0.0, 0.0, 0.0),  # all wrong
            group(1.0, 0.0, None),
            group(1.0, None, 1.0),  # all right among those that could be judged
            group(None, None, None),  # neither
            group(0.5, 0.2, 0.0),  # graded: one half is not right
        ]
    )
    assert summary.reward_errors == 5
    assert summary.mean_reward == pytest.approx((3 + 0 + 1 + 2 + 0.7) / 13)
    assert summary.correct_rate == pytest.approx(6 / 13)
    assert summary.groups_all_correct == 2
    assert summary.groups_all_wrong == 2
    assert summary.completion_tokens == 18 * 3
    assert summary.max_token_hit_rate == 0


def test_lengths_and_cut_completions():
    answers = (completion(5), completion(9, "length"), completion(1), completion(9, "length"))
    summary = summarize([group(0.0, 0.0, 1.0, 0.0, completions=answers)])
    assert summary.completion_tokens == 24
    assert summary.max_token_hit_rate == 0.5


def test_no_reward_at_all_is_not_a_reward_of_zero():
    summary = summarize([group(None, None)])
    assert summary.mean_reward is None
    assert summary.correct_rate is None
    assert summary.reward_errors == 2
    assert (summary.groups_all_correct, summary.groups_all_wrong) == (0, 0)


# ---------------------------------------------------------------- generations


def test_generation_rows():
    groups = [group(1.0, 0.0, index=7), group(None, 1.0, index=8)]
    written = generation_rows(3, groups, [[0.5, -0.5], [None, 0.0]], {(0, 1): (0.25, 2.0)})
    assert [(line["prompt_index"], line["reward"], line["error"], line["advantage"]) for line in written] == [
        (7, 1.0, None, 0.5),
        (7, 0.0, None, -0.5),
        (8, None, "timed out", None),
        (8, 1.0, None, 0.0),
    ]
    assert [(line["uncertainty_mean"], line["uncertainty_max"]) for line in written] == [
        (None, None),
        (0.25, 2.0),
        (None, None),
        (None, None),
    ]
    for line in written:
        assert line["step"] == 3
        assert (line["prompt"], line["reference"], line["completion"]) == ("2 + 3?", "5", "so 5")
        assert (line["num_tokens"], line["finish_reason"]) == (3, "stop")


# ---------------------------------------------------------------- the loop's records


class FakeBackend:
    uncertainty = "entropy"

    def step(self, batch, step):
        values = {"loss": 0.5, "grad_norm": 1.0, "lr": 1e-3, "exec_uncertainty_var": 0.1, "ratio_mean": 1.0}
        return StepResult(values, tuple((0.5, 1.0) for _ in batch.rollouts))

    def save(self, folder):
        (folder / "adapter").write_bytes(b"weights")

    def peak_memory_bytes(self):
        return 1

    def figures(self):
        return {}


class FakeEngine:
    overlaps, servers_alive = False, None

    def stage(self, version):
        self.version = version

    def use(self, version):
        assert version == self.version


class FakeCollector:
    """Step 0 gives no gradient and no verdict, step 1 teaches."""

    def collect(self, step, first_prompt, version, watch, batch_size):
        with watch("sample"):
            groups = [group(None, None) if step == 0 else group(1.0, 0.0)]
        return Collected(groups, [], first_prompt + 1)


class Silent:
    def __init__(self):
        self.seen = []

    def say(self, line):
        # Step 0 has no reward that could be computed, and that is to be said: once.
        assert line.startswith("warning: not one of the 2 rewards of step 1 could be computed")
        assert not self.seen[1:]

    def on_step(self, metrics, generations):
        self.seen.append((metrics, generations))


@pytest.fixture
def recorded(tmp_path):
    """metrics.jsonl and generations.jsonl of two steps of the real loop between fakes."""
    from retrain.algorithm.sepa import SepaController
    from retrain.training.interrupt import Interrupts
    from retrain.training.loop import Run, run_steps
    from retrain.training.pipeline import Pipeline

    config = build({"training": {"max_steps": 2, "batch_size": 1, "group_size": 2, "save_every": 5}})
    sepa = SepaController(**{key: getattr(config.sepa, key) for key in type(config.sepa).model_fields})
    observer = Silent()
    backend = FakeBackend()
    run = Run(
        config=config, state=TrainerState(seed=1), folder=RunFolder(tmp_path), backend=backend,
        pipeline=Pipeline(FakeEngine(), FakeCollector(), backend, staleness=0, max_steps=2, prompts_used=0),
        detect=lambda completions: [np.zeros(len(tokens), dtype=bool) for tokens in completions],
        sepa=sepa, interrupts=Interrupts(), observer=observer, evaluate=lambda: None,
    )  # fmt: skip
    run_steps(run)
    run.folder.close()
    return list(rows(tmp_path / METRICS)), list(rows(tmp_path / GENERATIONS)), observer.seen


def test_every_promised_key_exists_from_the_first_step(recorded):
    metrics, _, _ = recorded
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert set(line) >= PROMISED
        assert list(line) == list(metrics[0]), "the same keys in the same order in every line"
        assert all(value is None or not isinstance(value, float) or math.isfinite(value) for value in line.values())


def test_a_step_without_a_gradient_has_nulls_and_not_zeros(recorded):
    first, second = recorded[0]
    for key in ("loss", "grad_norm", "lr", "entropy_mean", "ratio_mean", "mean_reward", "correct_rate"):
        assert first[key] is None, key
    assert (first["num_datums"], first["reward_errors"], first["policy_version"]) == (0, 2, 0)
    assert (second["num_datums"], second["reward_errors"], second["policy_version"]) == (2, 0, 1)
    assert (second["loss"], second["lr"], second["correct_rate"]) == (0.5, 1e-3, 0.5)
    assert (first["warnings"], second["warnings"]) == (["reward_errors"], [])
    assert (first["skipped"], first["skipped_steps"]) == (None, 0)
    assert first["running_correct_rate"] is None
    assert second["running_correct_rate"] == 0.5
    assert second["uncertainty"] == "entropy"
    assert second["condition"] == "maxrl+gtpo_sepa"


def test_the_observer_sees_what_is_recorded(recorded):
    metrics, generations, seen = recorded
    assert [json.loads(json.dumps(line)) for line, _ in seen] == metrics
    assert [line for _, lines in seen for line in lines] == generations
    assert [line["reward"] for line in generations] == [None, None, 1.0, 0.0]


def test_what_a_clock_says_is_named(recorded):
    """Every other key must be equal between two equal runs."""
    assert set(MEASURED) <= set(recorded[0][0])
    assert {key for key in recorded[0][0] if key.endswith("_time_s")} <= set(MEASURED)
