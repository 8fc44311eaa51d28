"""The harness of `make torture`, with a handful of every kind of trial; and that it sees what it is there to see."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.torture import faults
from scripts.torture.compare import differences

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(1800)  # of the wall: minutes, where other processes want the machine as well
KINDS = {
    "killed at a write point, before": 2,
    "killed at a write point, power": 2,
    "killed while going back to an earlier checkpoint": 1,
    "killed at random moments, again and again": 1,
    "stopped by SIGINT or SIGTERM at a random moment": 1,
    "two processes on one folder": 5,
    "clock that jumps": 2,
    "resumed on more steps": 1,
    "finished run resumed": 1,
    "forked into another folder": 1,
    "refused": 2,
}


@pytest.fixture(scope="module")
def tortured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The counts of the quick torture of the real command."""
    path = tmp_path_factory.mktemp("torture") / "counts.json"
    command = [sys.executable, "-m", "scripts.torture", "--quick", "--seed", "7", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return json.loads(path.read_text())


def test_nothing_was_lost(tortured: dict) -> None:
    assert tortured["wrong"] == {}
    assert not tortured["out_of_time"]
    assert tortured["write_points"] > 150


def test_every_kind_was_tried(tortured: dict) -> None:
    tried = tortured["tried"]
    assert {name: tried.get(name) for name in KINDS} == KINDS
    assert sum(count for name, count in tried.items() if name.startswith("file ")) > 20
    assert sum(count for name, count in tried.items() if name.startswith("changed config")) >= 8
    assert tried.get("read-only folder") == 3 or "root" in tortured["skipped"]["read-only folder"]


# ---------------------------------------------------------------- the harness itself


def die(tmp_path: Path, work, **how) -> tuple[int, list[str]]:
    """Exit status and changes of a fork that does `work` in tmp_path/run, watched."""
    folder, told = tmp_path / "run", tmp_path / "points"
    shutil.rmtree(folder, ignore_errors=True)
    child = os.fork()
    if child == 0:
        watch = faults.Watch(folder, faults.Death(**how) if how else None)
        watch.install()
        work(folder)
        told.write_text("\n".join(watch.points))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, told.read_text().split("\n") if status == 0 else []


def writes(folder: Path) -> None:
    (folder / "deep").mkdir(parents=True)
    with (folder / "deep" / "a").open("ab", buffering=0) as file:
        file.write(b"synced..")
        os.fsync(file.fileno())
        file.write(b"unsynced")
    (folder / "deep" / "a").rename(folder / "b")
    os.truncate(folder / "b", 12)
    (folder / "c").write_text("text")
    shutil.rmtree(folder / "deep")
    (folder / "c").unlink()
    (folder.parent / "outside").write_text("not watched")


CHANGES = ["open deep/a", "write deep/a", "fsync deep/a", "write deep/a", "rename deep/a", "truncate b"]
CHANGES += ["open c", "write c", "rmdir deep", "remove c"]


def test_every_change_is_seen(tmp_path: Path) -> None:
    status, points = die(tmp_path, writes)
    assert status == 0
    # Folders are made from the inside out, some tried more than once.
    assert [point for point in points if not point.startswith("mkdir")] == CHANGES


def test_death_comes_before_the_change_and_can_tear_it_or_cut_the_power(tmp_path: Path) -> None:
    _, points = die(tmp_path, writes)
    last_write = points.index("rename deep/a") - 1
    for how, left in (
        ({"at": last_write}, b"synced.."),
        ({"at": last_write, "torn": True}, b"synced..unsy"),
        ({"at": last_write + 1}, b"synced..unsynced"),
        ({"at": last_write + 1, "power": True}, b"synced.."),
        ({"at": last_write - 1, "power": True}, b""),
    ):
        assert die(tmp_path, writes, **how)[0] == -9
        assert (tmp_path / "run" / "deep" / "a").read_bytes() == left, how
    assert die(tmp_path, writes, at=len(points))[0] == 0


def test_any_difference_between_two_runs_is_seen(tmp_path: Path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    (whole / "checkpoints").mkdir(parents=True)
    (whole / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "step_time_s": 1.0}\n')
    (whole / "generations.jsonl").write_text("{}\n")
    (whole / "config.toml").write_text('[logging]\nlog_dir = "a"\n')
    (whole / "metadata.json").write_text("{}")
    shutil.copytree(whole, other)
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "step_time_s": 2.0}\n')
    (other / "config.toml").write_text('[logging]\nlog_dir = "b"\n')
    (other / "metadata.json").write_text("[]")
    assert differences(whole, other) == []
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5000000000000001, "step_time_s": 2.0}\n')
    (other / "generations.jsonl").unlink()
    (other / ".config.toml.tmp").write_text("")
    (other / "config.toml").write_text('[logging]\nlog_dir = "b"\nstrict = true\n')
    assert differences(whole, other) == [
        ".config.toml.tmp: only in one of the two",
        "generations.jsonl: only in one of the two",
        "config.toml: differs",
        "metrics.jsonl: differs",
    ]


# ---------------------------------------------------------------- the soak


@pytest.mark.parametrize(
    ("leak", "files", "slower", "said"),
    [(0, 0, 0, ""), (10_000, 0, 0, "memory grew"), (0, 1, 0, "open files grew"), (0, 0, 1e-5, "a step takes")],
)
def test_the_soak_sees_what_grows(leak: int, files: int, slower: float, said: str) -> None:
    """Noise is no growth: every tenth step takes a hundred times as long, and memory goes up and down by 2 MB."""
    soak = runpy.run_path(str(ROOT / "scripts" / "soak.py"))
    rows = [
        (
            500_000_000 + (i % 3) * 10**6 + leak * i,
            10 + files * (i > 1500),
            (0.02 + slower * i) * (1 if i % 10 else 100),
        )
        for i in range(2000)
    ]
    complaints = soak["complaints"](soak["figures"](rows))
    assert [line[: len(said)] for line in complaints] == ([said] if said else [])
