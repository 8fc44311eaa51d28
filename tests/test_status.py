"""`retrain status`: what the records of runs say, in no time and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from retrain.cli import main
from retrain.config import dump_toml
from retrain.config.build import build
from retrain.training import checkpoint
from retrain.training.checkpoint import TrainerState
from retrain.training.folder import RunFolder, owner
from retrain.training.records import last_row


def row(step, **keys):
    return {
        "step": step,
        "step_time_s": 1.25,
        "tokens_per_s": 800.0,
        "correct_rate": 0.5,
        "running_correct_rate": 0.25,
        "warnings": ["truncated"],
    } | keys


def make_run(log_dir, *, steps=3, status="finished", saved=2, max_steps=9):
    log_dir.mkdir(parents=True)
    config = build({"training": {"max_steps": max_steps}, "model": {"model": "builtin:tiny"}})
    (log_dir / "config.toml").write_text(dump_toml(config))
    facts = {
        "condition": "maxrl+gtpo_sepa",
        "model": "builtin:tiny",
        "sessions": [{"status": "failed"}, {"status": status}],
    }
    (log_dir / "metadata.json").write_text(json.dumps(facts))
    (log_dir / "metrics.jsonl").write_text("".join(json.dumps(row(step)) + "\n" for step in range(1, steps + 1)))
    if saved is not None:
        checkpoint.write(log_dir, TrainerState(seed=1, step=saved), lambda folder: None, keep=0)
    return log_dir


def status(capsys, *arguments):
    code = main(["status", *map(str, arguments)])
    return code, *capsys.readouterr()


def as_json(capsys, path):
    code, out, err = status(capsys, path, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)["runs"]


def test_a_finished_run(tmp_path, capsys):
    log_dir = make_run(tmp_path / "run")
    assert as_json(capsys, log_dir) == [
        {
            "log_dir": str(log_dir),
            "state": "finished",
            "pid": None,
            "condition": "maxrl+gtpo_sepa",
            "model": "builtin:tiny",
            "step": 3,
            "max_steps": 9,
            "seconds_per_step": 1.25,
            "tokens_per_s": 800.0,
            "correct_rate": 0.5,
            "running_correct_rate": 0.25,
            "warnings": ["truncated"],
            "last_checkpoint": "step_000002",
        }
    ]
    code, out, err = status(capsys, log_dir)
    assert (code, err) == (0, "")
    line = next(line for line in out.splitlines() if str(log_dir) in line)
    for fact in ("finished", "3/9", "1.25", "50.0%", "25.0%", "step_000002", "truncated"):
        assert fact in line
    assert "pid" not in line


@pytest.mark.parametrize(
    ("recorded", "said"),
    [("interrupted", "interrupted"), ("failed", "failed"), ("running", "stopped")],
)
def test_how_a_run_ended(tmp_path, capsys, recorded, said):
    """A run that still says "running" but has no process died without a word."""
    assert as_json(capsys, make_run(tmp_path / "run", status=recorded))[0]["state"] == said


HOLD = """
import sys, time
from pathlib import Path
from retrain.training.folder import RunFolder
held = RunFolder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("recorded", ["running", "interrupted"])
def test_a_living_run(tmp_path, capsys, recorded):
    log_dir = make_run(tmp_path / "run", status=recorded)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(log_dir)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    entry = as_json(capsys, log_dir)[0]
    _, out, _ = status(capsys, log_dir)
    process.kill()
    process.wait()
    process.stdout.close()
    assert (entry["state"], entry["pid"]) == ("running", process.pid)
    assert f"running (pid {process.pid})" in out
    assert as_json(capsys, log_dir)[0]["pid"] is None


def test_a_run_that_has_only_begun(tmp_path, capsys):
    log_dir = make_run(tmp_path / "run", steps=0, status="running", saved=None)
    run = RunFolder(log_dir)
    assert owner(log_dir) is not None
    entry = as_json(capsys, log_dir)[0]
    run.close()
    assert entry["state"] == "running"
    assert (entry["step"], entry["correct_rate"], entry["last_checkpoint"]) == (0, None, None)
    (log_dir / "metrics.jsonl").unlink()
    code, out, _ = status(capsys, log_dir)
    assert code == 0
    assert "0/9" in out


def test_a_step_is_being_written(tmp_path, capsys):
    log_dir = make_run(tmp_path / "run")
    with (log_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "correct')
    assert as_json(capsys, log_dir)[0]["step"] == 3


def test_many_runs_in_the_order_of_their_names(tmp_path, capsys):
    for name in ("b/seed2", "b/seed1", "a", "c/[red]x[/]"):
        make_run(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "metadata.json").write_text("{}")
    make_run(tmp_path / "a" / "checkpoints" / "nested")
    found = [entry["log_dir"].removeprefix(f"{tmp_path}/") for entry in as_json(capsys, tmp_path)]
    assert found == ["a", "b/seed1", "b/seed2", "c/[red]x[/]"]
    _, out, _ = status(capsys, tmp_path)
    assert "c/[red]x[/]" in out, "not taken for markup"
    assert len(out.splitlines()) == 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.json", b""),
        ("metadata.json", b"[]"),
        ("metadata.json", b'{"condition": "a", "model": "b", "sessions": []}'),
        ("config.toml", b"[training"),
        ("config.toml", b"[model]\n"),
        ("config.toml", b"\xff"),
        ("metrics.jsonl", b"\0\0\0\n"),
    ],
)
def test_a_run_that_cannot_be_read_does_not_hide_the_others(tmp_path, capsys, name, content):
    make_run(tmp_path / "good")
    (make_run(tmp_path / "bad") / name).write_bytes(content)
    code, out, err = status(capsys, tmp_path, "--json")
    assert code == 0
    assert [entry["log_dir"] for entry in json.loads(out)["runs"]] == [str(tmp_path / "good")]
    assert err.startswith("warning: ")
    assert str(tmp_path / "bad") in err
    assert err.count("\n") == 1
    code, out, _ = status(capsys, tmp_path / "bad", "--json")
    assert code == 1
    assert json.loads(out) == {"campaigns": [], "runs": []}


def test_nothing_to_show(tmp_path, capsys):
    for arguments, needle in (
        ([tmp_path], "no run in"),
        ([tmp_path / "none"], "no such folder"),
        ([], "give the folder"),
        ([tmp_path, "--jsn"], "--json"),
    ):
        code, out, err = status(capsys, *arguments)
        assert (code, out) == (2, "")
        assert needle in err
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_a_million_steps(tmp_path, capsys):
    log_dir = make_run(tmp_path / "run")
    line = (json.dumps(row(7)) + "\n").encode()
    with (log_dir / "metrics.jsonl").open("wb") as file:
        for _ in range(1000):
            file.write(line * 1000)
        file.write((json.dumps(row(1_000_001)) + "\n").encode())
    began = time.process_time()
    assert last_row(log_dir / "metrics.jsonl") == row(1_000_001)
    assert as_json(capsys, log_dir)[0]["step"] == 1_000_001
    # Of the processor: the clock on the wall runs on when the machine is busy.
    assert time.process_time() - began < 1


def test_it_is_quick_and_needs_no_torch(tmp_path):
    make_run(tmp_path / "run")
    code = (
        "import sys; from retrain.cli import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    began = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code, "status", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path / "run") in done.stdout, "not folded: this is a pipe"
    # Of the processor: the clock on the wall runs on when the machine is busy.
    spent = os.times()
    assert spent.children_user + spent.children_system - began.children_user - began.children_system < 2
