"""`retrain status LOG_DIR`: the runs below a folder. Reads the ends of their records: no torch, no waiting."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrain.campaign.overview import find_campaigns, read_campaign
from retrain.cli.flags import parse
from retrain.tracking.console import number, percent
from retrain.training.folder import CONFIG, METADATA
from retrain.training.metrics import RUNNING_STEPS
from retrain.training.overview import find_runs, read_run
from retrain.types import ConfigError, RetrainError

WIDE = 240  # columns


def run(argv: Sequence[str]) -> int:
    parsed = parse(argv, "status")
    if not parsed.positionals:
        raise ConfigError("status: give the folder of a run, or one above several: retrain status logs")
    root = Path(parsed.positionals[0])
    if not root.is_dir():
        raise ConfigError(f"status: {root}: no such folder")
    if parsed.options["watch"]:
        if parsed.options["json"]:
            raise ConfigError("status: --watch is for a person and --json for a program; give one of them")
        from retrain.cli.watch import watch

        return watch(root)
    folders = list(find_runs(root))
    campaigns = list(_readable(find_campaigns(root), read_campaign))
    if not folders and not campaigns:
        raise ConfigError(f"status: there is no run in {root} or below it (no folder with {METADATA} and {CONFIG})")
    runs = list(_readable(folders, read_run))
    if parsed.options["json"]:
        print(json.dumps({"campaigns": campaigns, "runs": runs}, indent=2))
    else:
        # A table for a file or a pipe is not folded to the width of a terminal.
        console = Console(width=None if sys.stdout.isatty() else WIDE)
        if campaigns:
            console.print(_campaign_table(campaigns), "")
        console.print(_table(runs))
    return 0 if runs or campaigns else 1


def _readable(folders: Iterable[Path], read: Callable[[Path], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What can be read; what cannot must not hide the others."""
    for folder in folders:
        try:
            yield read(folder)
        except RetrainError as error:
            print(f"warning: {error}", file=sys.stderr)


def _campaign_table(campaigns: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("campaign", "state", "conditions x seeds", "steps", "runs"):
        table.add_column(name, justify="left" if name in ("campaign", "state", "runs") else "right", overflow="fold")
    for entry in campaigns:
        table.add_row(
            Text(entry["folder"]),
            _state(entry),
            f"{len(entry['conditions'])} x {len(entry['seeds'])}",
            str(entry["max_steps"]),
            ", ".join(f"{count} {state}" for state, count in sorted(entry["runs"].items())),
        )
    return table


def _state(entry: dict[str, Any]) -> str:
    return entry["state"] if entry["pid"] is None else f"{entry['state']} (pid {entry['pid']})"


def _table(runs: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    words = ("run", "state", "checkpoint", "warnings")
    for name in ("run", "state", "step", "s/step", "correct", f"last {RUNNING_STEPS}", "checkpoint", "warnings"):
        table.add_column(name, justify="left" if name in words else "right", overflow="fold")
    for entry in runs:
        table.add_row(
            Text(entry["log_dir"]),  # not markup, whatever it is called
            _state(entry),
            f"{entry['step']}/{entry['max_steps']}",
            number(entry["seconds_per_step"]),
            percent(entry["correct_rate"]),
            percent(entry["running_correct_rate"]),
            entry["last_checkpoint"] or "-",
            Text(", ".join(entry["warnings"]), style="yellow"),
        )
    return table
