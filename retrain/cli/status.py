"""`retrain status LOG_DIR`: the runs below a folder. Reads the ends of their records: no torch, no waiting."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrain.cli.flags import parse
from retrain.tracking.console import number, percent
from retrain.training.checkpoint import named
from retrain.training.folder import CONFIG, METADATA, METRICS, owner
from retrain.training.metrics import RUNNING_STEPS
from retrain.training.records import last_row
from retrain.types import ConfigError, RetrainError

WIDE = 240  # columns


def run(argv: Sequence[str]) -> int:
    parsed = parse(argv, "status")
    if not parsed.positionals:
        raise ConfigError("status: give the folder of a run, or one above several: retrain status logs")
    root = Path(parsed.positionals[0])
    if not root.is_dir():
        raise ConfigError(f"status: {root}: no such folder")
    folders = list(find_runs(root))
    if not folders:
        raise ConfigError(f"status: there is no run in {root} or below it (no folder with {METADATA} and {CONFIG})")
    runs = list(_readable(folders))
    if parsed.options["json"]:
        print(json.dumps({"runs": runs}, indent=2))
    else:
        # A table for a file or a pipe is not folded to the width of a terminal.
        Console(width=None if sys.stdout.isatty() else WIDE).print(_table(runs))
    return 0 if runs else 1


def find_runs(root: Path) -> Iterator[Path]:
    """Folders at or below `root` that hold a run, in the order of their names; a run's own folders are not entered."""
    for folder, inner, files in os.walk(root):
        inner.sort()
        if METADATA in files and CONFIG in files:
            inner.clear()
            yield Path(folder)


def read_run(log_dir: Path) -> dict[str, Any]:
    """What the records of one run say. state: running, or how it ended; "stopped" when it died without a word.

    Raises RetrainError where they are damaged or not this program's.
    """
    try:
        metadata = json.loads((log_dir / METADATA).read_bytes())
        config = tomllib.loads((log_dir / CONFIG).read_text(encoding="utf-8"))
        facts = {key: metadata[key] for key in ("condition", "model")}
        ended, max_steps = metadata["sessions"][-1]["status"], config["training"]["max_steps"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RetrainError(
            f"{log_dir}: its {METADATA} and {CONFIG} are not those of a run ({type(error).__name__}: {error})"
        ) from None
    last = last_row(log_dir / METRICS) or {}
    pid = owner(log_dir)
    return {
        "log_dir": str(log_dir),
        "state": "running" if pid is not None else "stopped" if ended == "running" else ended,
        "pid": pid,
        **facts,
        "step": last.get("step", 0),
        "max_steps": max_steps,
        "seconds_per_step": last.get("step_time_s"),
        "tokens_per_s": last.get("tokens_per_s"),
        "correct_rate": last.get("correct_rate"),
        "running_correct_rate": last.get("running_correct_rate"),
        "last_checkpoint": named(log_dir),
    }


def _readable(folders: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The runs that can be read; one that cannot must not hide the others."""
    for folder in folders:
        try:
            yield read_run(folder)
        except RetrainError as error:
            print(f"warning: {error}", file=sys.stderr)


def _table(runs: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "state", "step", "s/step", "correct", f"last {RUNNING_STEPS}", "checkpoint"):
        table.add_column(name, justify="left" if name in ("run", "state", "checkpoint") else "right", overflow="fold")
    for entry in runs:
        table.add_row(
            Text(entry["log_dir"]),  # not markup, whatever it is called
            entry["state"] if entry["pid"] is None else f"{entry['state']} (pid {entry['pid']})",
            f"{entry['step']}/{entry['max_steps']}",
            number(entry["seconds_per_step"]),
            percent(entry["correct_rate"]),
            percent(entry["running_correct_rate"]),
            entry["last_checkpoint"] or "-",
        )
    return table
