"""`retrain status LOG_DIR`: the runs below a folder. Reads the ends of their records: no torch, no waiting."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from retrain.cli.flags import parse
from retrain.config import load_config
from retrain.tracking.console import number, percent
from retrain.training.checkpoint import CHECKPOINTS, TRAINER_STATE
from retrain.training.folder import CONFIG, METADATA, METRICS, owner
from retrain.training.records import last_row
from retrain.types import ConfigError


def run(argv: Sequence[str]) -> int:
    parsed = parse(argv, "status")
    if not parsed.positionals:
        raise ConfigError("status: give the folder of a run, or one above several: retrain status logs")
    root = Path(parsed.positionals[0])
    if not root.is_dir():
        raise ConfigError(f"status: {root}: no such folder")
    runs = [read_run(folder) for folder in find_runs(root)]
    if not runs:
        raise ConfigError(f"status: there is no run in {root} or below it (no folder with {METADATA})")
    if parsed.options["json"]:
        print(json.dumps(runs, indent=2))
    else:
        Console().print(_table(runs))
    return 0


def find_runs(root: Path) -> Iterator[Path]:
    """Folders at or below `root` that hold a run, in the order of their names; a run's own folders are not entered."""
    for folder, inner, files in os.walk(root):
        inner.sort()
        if METADATA in files:
            inner.clear()
            yield Path(folder)


def read_run(log_dir: Path) -> dict[str, Any]:
    """What the records of one run say. state: running, or how it ended; "stopped" when it died without a word."""
    metadata = json.loads((log_dir / METADATA).read_bytes())
    last = last_row(log_dir / METRICS) or {}
    pid = owner(log_dir)
    state = "running" if pid is not None else metadata["sessions"][-1]["status"]
    return {
        "log_dir": str(log_dir),
        "state": "stopped" if state == "running" and pid is None else state,
        "pid": pid,
        "condition": metadata["condition"],
        "model": metadata["model"],
        "step": last.get("step", 0),
        "max_steps": load_config(log_dir / CONFIG).training.max_steps,
        "seconds_per_step": last.get("step_time_s"),
        "tokens_per_s": last.get("tokens_per_s"),
        "correct_rate": last.get("correct_rate"),
        "running_correct_rate": last.get("running_correct_rate"),
        "last_checkpoint": _last_checkpoint(log_dir),
    }


def _last_checkpoint(log_dir: Path) -> str | None:
    path = log_dir / TRAINER_STATE
    return json.loads(path.read_bytes())["checkpoint"].removeprefix(f"{CHECKPOINTS}/") if path.is_file() else None


def _table(runs: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "state", "step", "s/step", "correct", "last 10", "checkpoint"):
        table.add_column(name, justify="left" if name in ("run", "state", "checkpoint") else "right", overflow="fold")
    for entry in runs:
        table.add_row(
            entry["log_dir"],
            entry["state"] if entry["pid"] is None else f"{entry['state']} (pid {entry['pid']})",
            f"{entry['step']}/{entry['max_steps']}",
            number(entry["seconds_per_step"]),
            percent(entry["correct_rate"]),
            percent(entry["running_correct_rate"]),
            entry["last_checkpoint"] or "-",
        )
    return table
