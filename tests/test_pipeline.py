"""Sampling ahead of the training, and on another device: which policy samples which batch; nothing else moves."""

from __future__ import annotations

import time

import numpy as np
import pytest

from retrain.training.collect import Collected
from retrain.training.pipeline import Pipeline
from retrain.training.stopwatch import Stopwatch
from retrain.types import RetrainError
from runs import assert_same_run, lines, retrain, write_config

pytest_plugins = "pipeline_runs"

# ---- which policy samples which batch -------------------------------------------------------------------------------


class FakeBackend:
    """A policy that is the number of updates it has had."""

    updates = 0

    def snapshot(self):
        return b"policy %d" % self.updates

    def put(self, taken):
        self.updates = int(taken.split()[1])


class FakeEngine:
    def __init__(self, backend, overlaps):
        self.backend, self.overlaps, self.staged, self.used = backend, overlaps, {}, None

    def stage(self, version):
        self.staged.setdefault(version, self.backend.updates)

    def use(self, version):
        self.used = self.staged[version]
        self.staged = {staged: policy for staged, policy in self.staged.items() if staged >= version}
        self.policy_version = version

    def close(self):
        pass


class FakeCollector:
    """Each batch uses as many prompts as its step says, as dynamic sampling does."""

    def __init__(self, engine, fails_at=None):
        self.engine, self.fails_at, self.log = engine, fails_at, []

    def collect(self, step, first_prompt, version, watch, batch_size):
        if step == self.fails_at:
            raise RetrainError("the server is gone")
        assert self.engine.policy_version == version
        with watch("sample"):
            self.log.append((step, first_prompt, self.engine.used))
        return Collected([], [], first_prompt + 1 + step % 3)


def open_pipeline(staleness, overlaps, *, max_steps=9, prompts_used=0, **options):
    backend = FakeBackend()
    collector = FakeCollector(FakeEngine(backend, overlaps), **options)
    return Pipeline(
        collector.engine, collector, backend, staleness=staleness, max_steps=max_steps, prompts_used=prompts_used
    )


def train(pipeline, steps, version=0, prompts_used=0):
    """What the loop does with it: (step, version that sampled, prompts used when it is finished) of each step."""
    seen = []
    for step in steps:
        sampled = pipeline.take(step, version, 1, Stopwatch())
        prompts_used = sampled.batch.prompts_used
        seen.append((step, sampled.version, prompts_used))
        version += 1
        pipeline.backend.updates = version
    return seen


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_batch_is_sampled_by_the_policy_of_exactly_so_many_updates_ago(staleness, overlaps):
    pipeline = open_pipeline(staleness, overlaps)
    seen = train(pipeline, range(9))
    assert [version for _, version, _ in seen] == [max(0, step - staleness) for step in range(9)]
    assert pipeline.collector.log == [
        (step, sum(1 + before % 3 for before in range(step)), max(0, step - staleness)) for step in range(9)
    ]
    assert (pipeline.worker is not None) == (overlaps and staleness > 0)
    pipeline.close()


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("stop", [1, 2, 4, 8])
def test_a_restored_pipeline_goes_on_as_the_one_left_alone(tmp_path, staleness, overlaps, stop):
    whole, first = (open_pipeline(staleness, overlaps) for _ in range(2))
    expected = train(whole, range(9))
    half = train(first, range(stop))
    ahead = first.ahead(stop)
    assert ahead == [[step, max(0, step - staleness)] for step in range(stop, stop + staleness)]
    first.save(tmp_path, stop)
    second = open_pipeline(staleness, overlaps, prompts_used=half[-1][2])
    second.restore(tmp_path, ahead, 1)
    second.backend.updates = stop
    assert half + train(second, range(stop, 9), stop, half[-1][2]) == expected
    assert second.collector.log == whole.collector.log[stop:]


def test_a_prolonged_run_has_the_batches_of_one_that_was_longer_from_the_start(tmp_path):
    longer, short = open_pipeline(2, False), open_pipeline(2, False, max_steps=5)
    expected = train(longer, range(9))
    done = train(short, range(5))
    assert len(short.collector.log) == 5
    short.save(tmp_path, 5)
    again = open_pipeline(2, False, prompts_used=done[-1][2])
    again.restore(tmp_path, short.ahead(5), 1)
    again.backend.updates = 5
    assert done + train(again, range(5, 9), 5) == expected


@pytest.mark.parametrize("overlaps", [False, True])
def test_sampling_that_fails_is_raised_by_the_step_that_wants_it(overlaps):
    pipeline = open_pipeline(2, overlaps, fails_at=3)
    assert len(train(pipeline, range(3))) == 3
    assert [step for step, _ in pipeline.ahead(3)] == [3, 4]
    for step in (3, 4):
        with pytest.raises(RetrainError, match="the server is gone"):
            pipeline.take(step, 3, 1, Stopwatch())
    assert [step for step, *_ in pipeline.collector.log] == [0, 1, 2]


@pytest.mark.parametrize("overlaps", [False, True])
def test_an_evaluation_uses_the_newest_policy_and_disturbs_no_batch(overlaps):
    pipeline = open_pipeline(2, overlaps)
    seen = []
    for step in range(9):
        pipeline.take(step, step, 1, Stopwatch())
        pipeline.backend.updates = step + 1
        seen.append(pipeline.evaluate(step + 1, lambda: pipeline.engine.used))
    assert seen == list(range(1, 10))
    assert [policy for *_, policy in pipeline.collector.log] == [max(0, step - 2) for step in range(9)]


def test_what_is_waited_for_is_not_what_sampling_took():
    pipeline = open_pipeline(1, overlaps=True)
    collect = pipeline.collector.collect

    def slowly(*arguments):
        with arguments[3]("sample"):
            time.sleep(0.1)
        return collect(*arguments)

    pipeline.collector.collect = slowly
    for step in range(3):
        watch = Stopwatch()
        pipeline.take(step, step, 1, watch)
        time.sleep(0.2)  # training
    assert watch.stages["sample"] > 0.1
    assert watch.stages["wait"] < 0.05


# ---- the real command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [0, 2])
def test_the_same_bits_with_and_without_a_process_of_its_own(run, staleness):
    assert_same_run(run(staleness, "cpu"), run(staleness, "cpu,cpu"))


@pytest.mark.parametrize("staleness", [0, 2])
def test_versions_and_ratios_are_in_the_metrics(run, staleness):
    rows = lines(run(staleness) / "metrics.jsonl")
    updates = [row["policy_version"] for row in rows]
    before = [0, *updates[:-1]]
    assert updates[-1] >= 4, "the run learns"
    for step, row in enumerate(rows):
        assert row["sampler_version"] == before[max(0, step - staleness)]
        assert row["staleness"] == before[step] - row["sampler_version"]
        if row["loss"] is None:
            continue
        if row["staleness"] == 0:
            # The run drops out 10% of the adapter's input: its trainer differs a little from any sampler.
            assert abs(row["ratio_mean"] - 1) < 0.02
    assert max(row["staleness"] for row in rows) == staleness


def test_other_runs_are_other_runs(run):
    texts = {staleness: (run(staleness) / "generations.jsonl").read_bytes() for staleness in (0, 2)}
    assert len(set(texts.values())) == 2


def test_another_staleness_is_another_run(run):
    log_dir = run(1)
    done = retrain(log_dir / "config.toml", "--resume", log_dir, "--max-staleness", 2, "--max-steps", 8)
    assert done.returncode == 2
    assert "training.max_staleness" in done.stderr


@pytest.mark.parametrize("devices", ["cpu,gpu:7", "gpu:7,cpu", "gpu:0,gpu:1"])
def test_devices_that_do_not_exist(folder, tmp_path, devices):
    done = retrain(write_config(tmp_path, tmp_path / "run"), "--devices", devices)
    assert done.returncode == 2
    assert done.stderr.startswith('error: backend.devices = "gpu:') and "this machine has" in done.stderr
    assert not (tmp_path / "run").exists()


# ---- what theory says of the ratio ----------------------------------------------------------------------------------


def test_ratios_of_a_stale_sampler_average_to_one(tmp_path):
    """E_q[p / q] = 1 whatever p is, and E_q[log p / q] = -KL(q, p), which is half the variance of log p / q where p is
    near q: of thousands of tokens, sampled one update before."""
    import torch

    import tiny_models as models
    from retrain.backend.local import LocalBackend
    from retrain.inference.pytorch import PyTorchEngine

    settings = models.config_for("builtin:tiny", training__max_tokens=48)
    backend = LocalBackend(settings, seed=0, say=lambda line: None)
    engine = PyTorchEngine.of(backend.policy, settings.inference)
    prompts = [np.array(backend.tokenizer(f"{i} + {i + 7} =")["input_ids"]) for i in range(24)]
    streams = np.arange(24 * 8, dtype=np.uint64).reshape(24, 8)
    groups = engine.generate(prompts, streams, max_tokens=48, temperature=1.0)

    def log_ratios() -> torch.Tensor:
        found = []
        for prompt, group in zip(prompts, groups, strict=True):
            found += [backend.logprobs(prompt, c.tokens_T) - c.logprobs_T for c in group]
        return torch.from_numpy(np.concatenate(found)).double()

    on_policy = log_ratios()
    assert on_policy.abs().max() < 1e-4
    models.stir(backend.policy.peft, scale=0.02)
    stale = log_ratios()
    assert stale.abs().mean() > 0.01, "the policy has moved"
    count = len(stale)
    ratios = stale.exp()
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / count**0.5
    kl = -stale.mean()
    assert kl > 0
    assert abs(kl - stale.var() / 2) < 4 * (stale + stale.square() / 2).std() / count**0.5 + 0.1 * kl
