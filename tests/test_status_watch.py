"""`retrain status --watch`: a live view of runs, on a real terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
from rich.console import Console

from report_runs import make_campaign, make_run, metrics_row
from retrain.cli import main
from retrain.cli.watch import BARS, Followed, Watcher, sparkline
from retrain.types import RetrainError
from runs import environment

SHOW, HIDE = b"\x1b[?1049h", b"\x1b[?1049l"


def text(root, height=40, width=140):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(Watcher(root).screen(height))
    return console.export_text()


def test_sparkline():
    assert sparkline([0.0, 0.5, 1.0, None], 8) == f"{BARS[0]}{BARS[4]}{BARS[7]} "
    assert sparkline([0.0] * 50 + [1.0] * 50, 10) == BARS[0] * 5 + BARS[7] * 5
    assert sparkline([], 10) == ""
    assert sparkline([None, 1.0], 1) == BARS[7], "a step without a rate is not a rate of 0"
    for count in range(1, 60):
        assert len(sparkline([0.3] * count, 24)) == min(count, 24)


def test_runs_and_campaigns(tmp_path):
    make_campaign(tmp_path / "ablation", seeds=(1, 2))
    (tmp_path / "ablation" / "manifest.json").unlink()
    make_run(tmp_path / "[red]x[/]", row=lambda step: metrics_row(step, correct_rate=step / 10, warnings=["truncated"]))
    lines = text(tmp_path).splitlines()
    assert lines[0].rstrip() == f"{tmp_path}: 5 finished"
    line = next(line for line in lines if "[red]x[/]" in line)
    for fact in ("finished", "10/10", "1.5", sparkline([step / 10 for step in range(1, 11)], 24), "50.0%", "truncated"):
        assert fact in line
    assert sum("maxrl+gtpo_sepa_s" in line for line in lines) == 2


def test_what_does_not_fit_is_counted_and_what_runs_comes_first(tmp_path):
    from retrain.training.folder import RunFolder

    for i in range(20):
        make_run(tmp_path / f"run{i:02d}", status="running")
    alive = RunFolder(tmp_path / "run17")
    lines = text(tmp_path, height=12).splitlines()
    alive.close()
    assert len(lines) <= 12
    assert "run17" in lines[3]
    assert "running" in lines[3]
    assert "14 more runs do not fit" in lines[-1]


def test_it_follows_what_is_added_and_what_a_resume_cuts(tmp_path):
    path = make_run(tmp_path / "run", steps=3) / "metrics.jsonl"
    followed = Followed(path)
    followed.update()
    assert (len(followed.rates), followed.seconds_left(4)) == (3, 6.0)
    with path.open("a") as file:
        file.write('{"step": 4, "correct_rate": 0.75, "step_')
    followed.update()
    assert len(followed.rates) == 3, "a step is being written"
    with path.open("a") as file:
        file.write('time_s": 3.5}\n')
    followed.update()
    assert followed.rates == [0.5, 0.5, 0.5, 0.75]
    os.truncate(path, path.read_bytes().index(b"\n") + 1)
    followed.update()
    assert followed.rates == [0.5]
    path.write_bytes(path.read_bytes() + b"\0\0\n")
    with pytest.raises(RetrainError, match="damaged line"):
        followed.update()


def test_a_damaged_run_is_said_and_hides_nothing(tmp_path):
    make_run(tmp_path / "good")
    (make_run(tmp_path / "bad") / "metadata.json").write_text("[]")
    shown = text(tmp_path)
    assert "good" in shown
    assert "not those of a run" in shown


def test_it_needs_a_terminal(tmp_path, capsys):
    make_run(tmp_path / "run")
    assert main(["status", str(tmp_path), "--watch"]) == 2
    assert "needs a terminal" in capsys.readouterr().err
    assert main(["status", str(tmp_path), "--watch", "--json"]) == 2
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize("leave", ["q", "ctrl-c"])
def test_on_a_real_terminal(tmp_path, leave):
    """What is typed ends it, the status is 0, and the terminal is as it was."""
    make_run(tmp_path / "first")
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        [sys.executable, "-m", "retrain", "status", str(tmp_path), "--watch"],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**environment(), "TERM": "xterm-256color", "COLUMNS": "120"},
        start_new_session=True,
    )  # fmt: skip
    seen = read_until(ours, b"first")
    assert SHOW in seen
    make_run(tmp_path / "second")
    read_until(ours, b"second")
    if leave == "q":
        os.write(ours, b"q")
    else:
        process.send_signal(signal.SIGINT)
    rest = read_until(ours, HIDE)
    assert process.wait(timeout=60) == 0
    assert b"Traceback" not in rest
    assert termios.tcgetattr(theirs) == before
    os.close(theirs)
    os.close(ours)


def read_until(terminal, needle, seconds=90):
    data, deadline = b"", time.monotonic() + seconds
    while needle not in data:
        assert time.monotonic() < deadline, data
        if select.select([terminal], [], [], 1)[0]:
            data += os.read(terminal, 65536)
    return data
