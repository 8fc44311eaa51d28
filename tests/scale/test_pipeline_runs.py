"""Runs that sample ahead, stopped, killed, prolonged and robbed of their sampler: they go on to the same bits."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from runs import assert_same_run, lines, retrain, start

pytestmark = pytest.mark.scale
pytest_plugins = "pipeline_runs"


@pytest.mark.parametrize(("sent", "staleness"), [(signal.SIGTERM, 1), (signal.SIGKILL, 2)])
def test_stopped_or_killed_it_goes_on_to_the_same_bits(run, config, folder, sent, staleness):
    log_dir = folder / f"stopped-{staleness}-{sent.name}"
    process = start(config(log_dir), "--max-staleness", staleness, "--devices", "cpu,cpu")
    while not (log_dir / "metrics.jsonl").exists() or len(lines(log_dir / "metrics.jsonl")) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    (sampler,) = children(process.pid)
    process.send_signal(sent)
    _, stderr = process.communicate()
    assert process.returncode == (130 if sent == signal.SIGTERM else -signal.SIGKILL), stderr
    assert "Traceback" not in stderr
    wait_for_end(sampler)
    done = retrain(log_dir / "config.toml", "--resume", log_dir)
    assert done.returncode == 0, done.stderr
    assert_same_run(run(staleness), log_dir)


def test_a_shorter_run_that_is_prolonged(run, config, folder):
    log_dir = folder / "prolonged"
    short = retrain(config(log_dir), "--max-staleness", 2, "--max-steps", 3, "--lr-schedule", "constant")
    assert short.returncode == 0, short.stderr
    done = retrain(log_dir / "config.toml", "--resume", log_dir, "--max-steps", 6)
    assert done.returncode == 0, done.stderr
    long_dir = folder / "long"
    whole = retrain(config(long_dir), "--max-staleness", 2, "--max-steps", 6, "--lr-schedule", "constant")
    assert whole.returncode == 0, whole.stderr
    assert (log_dir / "generations.jsonl").read_bytes() == (long_dir / "generations.jsonl").read_bytes()
    assert (log_dir / "final/adapter_model.safetensors").read_bytes() == (
        long_dir / "final/adapter_model.safetensors"
    ).read_bytes()


def test_a_sampler_that_dies_ends_the_run_with_a_checkpoint(run, config, folder):
    log_dir = folder / "orphaned"
    process = start(config(log_dir), "--max-staleness", 1, "--devices", "cpu,cpu")
    while not (log_dir / "metrics.jsonl").exists() or len(lines(log_dir / "metrics.jsonl")) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    (sampler,) = children(process.pid)
    os.kill(sampler, signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert "error: the process that samples on cpu died (signal 9)" in stderr
    assert "Traceback" not in stderr
    assert f"--resume {log_dir}" in stderr
    done = retrain(log_dir / "config.toml", "--resume", log_dir)
    assert done.returncode == 0, done.stderr
    assert_same_run(run(1), log_dir)


def children(pid: int) -> list[int]:
    """The sampling processes of a run."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child) for child in found if b"retrain.inference.sampler" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.01)
