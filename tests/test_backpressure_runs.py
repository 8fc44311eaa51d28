"""Backpressure in a run: the real command, its records, and going on from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retrain.backpressure.controller import decide, restore
from retrain.config import load_config
from runs import lines, retrain, write_config

ADAPTIVE = """
[backpressure]
enabled = true
warmup_steps = 4
max_batch_size = 6
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped by max_steps in the middle, and gone on with."""
    folder = tmp_path_factory.mktemp("adaptive")
    done = retrain(write_config(folder, folder / "run", ADAPTIVE), "--max-steps", 5, "--lr-schedule", "constant")
    assert done.returncode == 0, done.stderr
    done = retrain(folder / "run" / "config.toml", "--resume", folder / "run", "--max-steps", 8)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def loop_state(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step_{step:06d}" / "loop.json").read_text())


def test_records(run: Path) -> None:
    rows = lines(run / "metrics.jsonl")
    assert [row["batch_size"] for row in rows[:4]] == [1, 2, 4, 6]
    assert [row["bp_action"] for row in rows[:4]] == ["warmup"] * 4
    assert all(row["bp_action"] in ("hold", "increase", "throttle", "warmup") for row in rows[4:])
    for row in rows:
        assert row["bp_p"] == row["batch_size"] * row["group_size"]
        assert 1 <= row["batch_size"] <= 6
        if row["num_datums"]:
            # Slower than the sampling alone.
            assert 0 < row["bp_throughput"] < row["completion_tokens"] / row["sample_time_s"]
        else:
            assert row["bp_throughput"] is None


def test_the_data_position_counts_what_was_asked(run: Path) -> None:
    rows, generations = lines(run / "metrics.jsonl"), lines(run / "generations.jsonl")
    asked = list(dict.fromkeys((row["step"], row["prompt_index"]) for row in generations))
    assert [index for _, index in asked] == list(range(sum(row["batch_size"] for row in rows)))
    assert loop_state(run, 8)["prompts_used"] == len(asked)


def test_a_resumed_run_goes_on_with_what_was_measured(run: Path) -> None:
    rows = lines(run / "metrics.jsonl")
    before, after = (loop_state(run, step)["backpressure"] for step in (5, 8))
    measured = [[row["batch_size"], row["bp_throughput"]] for row in rows if row["bp_throughput"] is not None]
    assert after["window"] == measured
    assert before["window"] == measured[: len(before["window"])]
    assert (before["steps"], after["steps"]) == (5, 8)
    config = load_config(run / "config.toml")
    decision = decide(restore(before), config.backpressure, config.training.group_size)
    assert (rows[5]["batch_size"], rows[5]["bp_action"]) == (decision.batch_size, decision.action)


def test_batch_size_outside_the_bounds_is_refused(tmp_path: Path) -> None:
    done = retrain(write_config(tmp_path, tmp_path / "run", ADAPTIVE), "--training-batch-size", 7)
    assert done.returncode == 2
    assert "training.batch_size = 7" in done.stderr
    assert not (tmp_path / "run").exists()
