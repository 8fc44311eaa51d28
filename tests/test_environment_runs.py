"""Training in verifiers environments, through the real command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import runs

ENVIRONMENTS = Path(__file__).parent / "environments"

CONFIG = """
[backend]
devices = "cpu"
[model]
model = "builtin:tiny"
lora_rank = 4
[environment]
provider = "verifiers"
id = "{name}"
{keys}
[algorithm]
advantage_mode = "grpo"
transform_mode = "gtpo_sepa_hicra"
[training]
seed = 5
max_steps = 4
batch_size = 3
group_size = 4
max_tokens = 60
lr = 1e-3
save_every = 2
[reward]
max_error_rate = {most}
[logging]
log_dir = "{log_dir}"
"""


@pytest.fixture(autouse=True)
def environments(monkeypatch):
    folders = [str(folder) for folder in ENVIRONMENTS.iterdir()]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))


def config(folder, name, *, keys="", most=0.5, log_dir="run"):
    path = folder / "config.toml"
    path.write_text(CONFIG.format(name=name, keys=keys, most=most, log_dir=folder / log_dir))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["retrain_sums", "retrain_tool_sums"])
def test_a_run(tmp_path, name):
    done = runs.retrain(config(tmp_path, name))
    assert done.returncode == 0, done.stderr
    steps, samples = rows(tmp_path / "run" / "metrics.jsonl"), rows(tmp_path / "run" / "generations.jsonl")
    assert len(steps) == 4
    assert len(samples) == 4 * 12
    # The trainer finds the log-probs of the tokens that were sampled: it was given their ids, in their context.
    assert max(row["logprob_gap_max"] or 0 for row in steps) < 1e-4
    assert any(row["num_datums"] > 0 and row["grad_norm"] > 0 for row in steps)
    assert all(row["reward_errors"] == 0 for row in steps)
    assert all(sample["num_tokens"] <= 60 for sample in samples)
    multi = name == "retrain_tool_sums"
    for sample in samples:
        assert ("The machine says" in sample["completion"]) <= multi
        assert sample["prompt"].startswith("What is")
    assert any("The machine says" in sample["completion"] for sample in samples) == multi
    assert steps[-1]["completion_tokens"] == sum(s["num_tokens"] for s in samples if s["step"] == steps[-1]["step"])


def test_it_resumes_exactly(tmp_path):
    whole = runs.retrain(config(tmp_path, "retrain_tool_sums", log_dir="whole"))
    assert whole.returncode == 0, whole.stderr
    path = config(tmp_path, "retrain_tool_sums", log_dir="parts")
    assert runs.retrain(path, "--max-steps", "2").returncode == 0
    assert runs.retrain(path, "--resume", tmp_path / "parts").returncode == 0
    runs.assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_faults_are_counted_and_too_many_end_the_run(tmp_path):
    keys = 'args = { fault = "raise", every = 3 }'
    done = runs.retrain(config(tmp_path, "retrain_tool_sums", keys=keys, most=0.9, log_dir="some"))
    assert done.returncode == 0, done.stderr
    samples = rows(tmp_path / "some" / "generations.jsonl")
    wrong = [sample for sample in samples if sample["reward"] is None]
    assert 0 < len(wrong) < len(samples)
    assert sum(row["reward_errors"] for row in rows(tmp_path / "some" / "metrics.jsonl")) == len(wrong)
    assert all("broken" in sample["error"] for sample in wrong)
    keys = """args = '{"fault": "raise"}'"""
    done = runs.retrain(config(tmp_path, "retrain_tool_sums", keys=keys, most=0.5, log_dir="all"))
    assert done.returncode == 1
    assert "12 of 12 rewards of a step could not be computed" in done.stderr
    assert "broken" in done.stderr


def test_it_is_evaluated(tmp_path):
    path = config(tmp_path, "retrain_sums")
    done = runs.retrain("eval", path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 20
    done = runs.retrain("eval", config(tmp_path, "retrain_tool_sums"))
    assert done.returncode == 2
    assert "it holds no example out to evaluate on" in done.stderr


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("retrain_sums", 'args = { split = "eval" }', "it has no training set"),
        ("no-such-environment", "", "no module no_such_environment is installed"),
        ("retrain_sums", "max_turns = 0", "environment.max_turns = 0"),
        ("retrain_sums", "args = '{'", "environment.args"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, name, keys, message):
    done = runs.retrain(config(tmp_path, name, keys=keys))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()
