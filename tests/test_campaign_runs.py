"""Campaigns by the real command: what they leave behind; killed and stopped anywhere, the same results; no orphans."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from campaign_rig import BROKEN, CAMPAIGN, write_campaign
from runs import assert_same_run, lines, retrain, start

RUNS = ("grpo+none_s11", "sepa_s11")


# Enough tokens for an answer, so that there is something to learn; and what the runs began with stays there.
FLAGS = ("--group-size", 8, "--max-tokens", 48, "--keep-checkpoints", 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The campaign that nobody disturbed: two conditions, one seed."""
    folder = tmp_path_factory.mktemp("whole")
    done = retrain(write_campaign(folder), "--campaign-dir", folder / "c", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (folder / "stdout").write_text(done.stdout)
    return folder / "c"


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(holds: Any, what: str) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def state(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {name: run["state"] for name, run in manifest["runs"].items()}


def test_what_is_left_behind(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {"manifest.json", "results.json", "report.html", "runs", ".lock"}
    manifest = json.loads((whole / "manifest.json").read_text())
    assert state(whole) == dict.fromkeys(RUNS, "finished")
    assert manifest["state"] == "finished"
    assert manifest["seeds"] == [11]
    for name in RUNS:
        assert (whole / "runs" / name / "final/adapter_model.safetensors").is_file()
        rows = lines(whole / "runs" / name / "metrics.jsonl")
        assert len(rows) == 6
        assert any(row["num_datums"] for row in rows), "it is to learn something"
        assert "step 6/6" in (whole / "runs" / name / "console.log").read_text()
    assert (whole / "report.html").read_text().startswith("<!")
    assert "one seed: no interval and no test exists" in (whole.parent / "stdout").read_text()


def test_conditions_of_a_seed_are_paired(whole: Path) -> None:
    """The same prompts in the same order, the same first adapter and completions, and only then a difference."""
    folders = [whole / "runs" / name for name in RUNS]
    first, second = (lines(folder / "generations.jsonl") for folder in folders)
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    for step, same in ((0, True), (6, False)):
        adapters = [(f / f"checkpoints/step_{step:06d}/adapter_model.safetensors").read_bytes() for f in folders]
        assert (adapters[0] == adapters[1]) is same
    beginning = [[row["completion"] for row in rows if row["step"] == 1] for rows in (first, second)]
    assert beginning[0] == beginning[1]


def test_killed_and_stopped_the_results_are_the_same(whole: Path, tmp_path: Path) -> None:
    config, folder = write_campaign(tmp_path, f"{CAMPAIGN}[squeeze]\ntarget_ranks = [1, 4]\n"), tmp_path / "c"
    arguments = (config, "--campaign-dir", folder, *FLAGS)
    metrics = [folder / "runs" / name / "metrics.jsonl" for name in RUNS]

    # Killed without a chance to say anything: the run ends with it.
    campaign = start(*arguments, "--no-parallel")
    wait_until(lambda: any(path.exists() and path.stat().st_size for path in metrics), "no run gets on")
    workers = children(campaign.pid)
    assert workers
    campaign.kill()
    campaign.communicate()
    wait_until(lambda: not any(map(alive, workers)), "a run outlives its campaign")
    assert json.loads((folder / "manifest.json").read_text())["state"] == "running"
    listed = json.loads(retrain("status", folder, "--json").stdout)
    assert [entry["state"] for entry in listed["campaigns"]] == ["stopped"]

    # Stopped by Ctrl-C, which reaches the campaign alone: its run writes a checkpoint and ends.
    campaign = start(*arguments, "--no-parallel")
    wait_until(lambda: "running" in state(folder).values() and children(campaign.pid), "no run is started again")
    workers = children(campaign.pid)
    campaign.send_signal(signal.SIGINT)
    _, stderr = campaign.communicate()
    assert campaign.returncode == 130, stderr
    assert not any(map(alive, workers))
    assert f"--campaign-dir {folder}" in stderr
    assert json.loads((folder / "manifest.json").read_text())["state"] == "interrupted"

    done = retrain(*arguments)
    assert done.returncode == 0, (done.stdout, done.stderr)
    results = (folder / "results.json").read_bytes()
    assert results == (whole / "results.json").read_bytes()
    for name in RUNS:
        assert_same_run(whole / "runs" / name, folder / "runs" / name)

    noted = json.loads((folder / "manifest.json").read_text())["squeeze"]
    assert noted["run"] in RUNS
    assert noted["analysis"]["mean_variance"]["4"] == pytest.approx(1)
    assert noted["analysis"] == json.loads((folder / "squeeze.json").read_text())
    assert f"squeeze of {noted['run']}" in done.stdout

    # Once more: what is finished is kept.
    before = [path.stat().st_mtime_ns for path in metrics]
    done = retrain(*arguments)
    assert done.returncode == 0, done.stderr
    assert "going on: 2 of 2 runs finished" in done.stdout
    assert [path.stat().st_mtime_ns for path in metrics] == before
    assert (folder / "results.json").read_bytes() == results


def test_a_failed_run_is_named(tmp_path: Path) -> None:
    done = retrain(write_campaign(tmp_path, BROKEN))
    assert done.returncode == 1, done.stderr
    (folder,) = (tmp_path / "logs").iterdir()
    assert "0 of 1 runs finished, 1 failed" in done.stderr
    assert "broken_s11: model.model" in done.stderr
    assert "./nothing-here" in done.stderr
    assert f"--campaign-dir {folder}" in done.stderr
    assert "Traceback" not in done.stderr
    assert state(folder) == {"broken_s11": "failed"}
    assert json.loads((folder / "results.json").read_text())["missing"] == {"broken_s11": "failed"}


def test_another_config_is_refused(whole: Path) -> None:
    before = (whole / "manifest.json").read_bytes()
    done = retrain(whole.parent / "campaign.toml", "--campaign-dir", whole, *FLAGS, "--lr", 0.5, "--max-steps", 9)
    assert done.returncode == 2
    assert "training.lr: 0.001 there, 0.5 here" in done.stderr
    assert "campaign.max_steps: 0 there, 9 here" in done.stderr
    assert (whole / "manifest.json").read_bytes() == before


def test_status_shows_the_campaign(whole: Path) -> None:
    done = retrain("status", whole.parent)
    assert done.returncode == 0, done.stderr
    assert "2 x 1" in done.stdout
    assert "2 finished" in done.stdout


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """The runs are still loading when the first comes; neither they nor the campaign are there after the second."""
    campaign = start(write_campaign(tmp_path), "--campaign-dir", tmp_path / "c")
    wait_until(lambda: (tmp_path / "c/manifest.json").exists() and children(campaign.pid), "nothing is started")
    workers = children(campaign.pid)
    campaign.send_signal(signal.SIGTERM)
    campaign.send_signal(signal.SIGTERM)
    campaign.communicate()
    assert campaign.returncode == 130
    wait_until(lambda: not any(map(alive, workers)), "a run outlives its campaign")
