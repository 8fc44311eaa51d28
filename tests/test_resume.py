"""Killed or stopped anywhere and resumed, a run is bit for bit the run that was left alone."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from runs import assert_same_run, lines, retrain, start, write_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = retrain(write_config(folder, folder / "run"))
    assert done.returncode == 0, done.stderr
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


def test_same_seed_same_bits(whole: Path, tmp_path: Path) -> None:
    done = retrain(write_config(tmp_path, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, tmp_path / "run")


def test_another_seed_is_another_run(whole: Path, tmp_path: Path) -> None:
    done = retrain(write_config(tmp_path, tmp_path / "run"), "--seed", 12, "--max-steps", 1)
    assert done.returncode == 0, done.stderr
    assert lines(whole / "generations.jsonl")[0] != lines(tmp_path / "run" / "generations.jsonl")[0]


@pytest.mark.parametrize("step", [1, 4])
def test_killed(whole: Path, tmp_path: Path, step: int) -> None:
    log_dir = tmp_path / "run"
    process = start(write_config(tmp_path, log_dir))
    wait_for(log_dir, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resume(log_dir)
    assert_same_run(whole, log_dir)


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGTERM), (3, signal.SIGINT)])
def test_stopped(whole: Path, tmp_path: Path, step: int, number: signal.Signals) -> None:
    log_dir = tmp_path / "run"
    process = start(write_config(tmp_path, log_dir))
    wait_for(log_dir, step)
    process.send_signal(number)
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
    process = start(write_config(tmp_path, log_dir))
    assert process.stdout is not None
    assert "steps of" in process.stdout.readline()
    assert "loading" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_killed_twice_then_extended(whole: Path, tmp_path: Path) -> None:
    """Three steps and then three more are six, when nothing but max_steps changes the schedule."""
    log_dir = tmp_path / "run"
    constant = ("--lr-schedule", "constant")
    done = retrain(write_config(tmp_path, log_dir), *constant, "--max-steps", 3)
    assert done.returncode == 0, done.stderr
    resume(log_dir, "--max-steps", 6)
    other = tmp_path / "other"
    done = retrain(write_config(tmp_path, other), *constant)
    assert done.returncode == 0, done.stderr
    assert_same_run(other, log_dir)
    sessions = json.loads((log_dir / "metadata.json").read_text())["sessions"]
    assert sessions[1]["resumed"]["changed"] == {"training.max_steps": [3, 6]}


def test_finished_run_says_so(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    done = retrain(whole / "config.toml", "--resume", whole)
    assert done.returncode == 0
    assert "finished" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_fork_into_another_folder(whole: Path, tmp_path: Path) -> None:
    """From an earlier checkpoint, in a folder of its own; the first run stays as it is."""
    source = tmp_path / "source"
    shutil.copytree(whole, source)
    fork = tmp_path / "fork"
    point = source / "checkpoints" / "step_000004"
    done = retrain(source / "config.toml", "--resume", point, "--log-dir", fork)
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, fork)
    assert json.loads((fork / "metadata.json").read_text())["sessions"][0]["resumed"]["from"] == str(point)


def test_refuses_to_write_over_a_run(whole: Path, tmp_path: Path) -> None:
    done = retrain(write_config(tmp_path, whole))
    assert done.returncode == 2
    assert f"--resume {whole}" in done.stderr


def test_refuses_another_experiment(whole: Path) -> None:
    done = retrain(whole / "config.toml", "--resume", whole, "--lr", "1e-5", "--group-size", 8)
    assert done.returncode == 2
    assert "training.lr" in done.stderr
    assert "training.group_size" in done.stderr


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    config = write_config(tmp_path, tmp_path / "run")
    done = retrain(config, "--resume", tmp_path)
    assert done.returncode == 2
    assert "no checkpoint" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["empty", "flipped"])
def test_damaged_checkpoint_is_named_and_the_good_one_works(whole: Path, tmp_path: Path, damage: str) -> None:
    log_dir = tmp_path / "run"
    shutil.copytree(whole, log_dir)
    shutil.rmtree(log_dir / "final")
    victim = log_dir / "checkpoints" / "step_000006" / "adapter_model.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data if damage == "flipped" else b"")
    config = log_dir / "config.toml"
    done = retrain(config, "--resume", log_dir, "--log-dir", log_dir)
    assert done.returncode == 2
    assert "adapter_model.safetensors" in done.stderr
    good = log_dir / "checkpoints" / "step_000004"
    assert f"--resume {good}" in done.stderr
    done = retrain(config, "--resume", good, "--log-dir", log_dir)
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, log_dir)
