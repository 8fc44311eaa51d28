"""Stopped by a signal and resumed, a run is bit for bit the run that was left alone. Killed: test_torture.py."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from runs import assert_same_run, lines, retrain, start, write_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = retrain(write_config(folder, folder / "run", learns=True))
    assert done.returncode == 0, done.stderr
    assert sum(row["grad_norm"] is not None for row in lines(folder / "run" / "metrics.jsonl")) >= 3
    return folder / "run"


def wait_for(log_dir: Path, step: int) -> None:
    """Until the run has recorded `step`."""
    deadline = time.monotonic() + 180
    path = log_dir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)


def resume(log_dir: Path, *flags: object) -> None:
    done = retrain(log_dir / "config.toml", "--resume", log_dir, *flags)
    assert done.returncode == 0, done.stderr


def test_another_seed_is_another_run(whole: Path, tmp_path: Path) -> None:
    done = retrain(write_config(tmp_path, tmp_path / "run", learns=True), "--seed", 12, "--max-steps", 1)
    assert done.returncode == 0, done.stderr
    assert lines(whole / "generations.jsonl")[0] != lines(tmp_path / "run" / "generations.jsonl")[0]


def test_stopped(whole: Path, tmp_path: Path) -> None:
    log_dir = tmp_path / "run"
    process = start(write_config(tmp_path, log_dir, learns=True))
    wait_for(log_dir, 3)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert f"--resume {log_dir}" in stderr
    stopped_at = json.loads((log_dir / "trainer_state.json").read_text())["step"]
    assert len(lines(log_dir / "metrics.jsonl")) == stopped_at
    resume(log_dir)
    assert_same_run(whole, log_dir)


def test_stopped_while_it_loads(tmp_path: Path) -> None:
    log_dir = tmp_path / "run"
    process = start(write_config(tmp_path, log_dir, learns=True))
    assert process.stdout is not None
    assert "steps of" in process.stdout.readline()
    assert "loading" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in stderr
