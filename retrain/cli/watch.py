"""`retrain status LOG_DIR --watch`: the runs below a folder as they go, until q is pressed. No torch."""

from __future__ import annotations

import json
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from retrain.campaign.overview import find_campaigns, read_campaign
from retrain.tracking.console import clock, number, percent
from retrain.training.folder import METRICS
from retrain.training.metrics import RUNNING_STEPS
from retrain.training.overview import find_runs, read_run
from retrain.types import ConfigError, RetrainError

SECONDS = 2.0
BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 24
# Lines of the screen that are not runs: the title, the head of the table, what is left out, and some air.
OTHER_LINES = 6


@dataclass
class Followed:
    """What was read of one run's metrics so far; `update` reads on from there."""

    path: Path
    rates: list[float | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    read: int = 0

    def update(self) -> None:
        """Raises RetrainError for a line that is no record. A file that became shorter was cut by a resume."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self.read:
                self.rates, self.times, self.read = [], [], 0
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._add(line)
                self.read += len(line)

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            rate, seconds = row["correct_rate"], row["step_time_s"]
        except (ValueError, KeyError, TypeError):
            raise RetrainError(f"{self.path} has a damaged line after byte {self.read}") from None
        self.rates.append(rate)
        self.times = [*self.times, seconds][-RUNNING_STEPS:]
        self.warnings = tuple(row.get("warnings") or ())

    def seconds_left(self, steps: int) -> float | None:
        """At the pace of the last steps."""
        return sum(self.times) / len(self.times) * steps if self.times else None


class Watcher:
    """Everything below a folder, read again and again; what was read of a long run is not read twice."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._followed: dict[Path, Followed] = {}

    def screen(self, height: int) -> Group:
        """What is to be seen now, in so many lines."""
        runs, problems = [], []
        for folder in find_runs(self.root):
            followed = self._followed.setdefault(folder, Followed(folder / METRICS))
            try:
                entry = read_run(folder)
                followed.update()
                runs.append((folder, entry, followed))
            except RetrainError as error:
                problems.append(str(error))
        campaigns = list(self._campaigns(problems))
        runs.sort(key=lambda run: run[1]["pid"] is None)
        room = max(1, height - OTHER_LINES - len(campaigns) - len(problems))
        more = f"{len(runs) - room} more runs do not fit on this screen" if len(runs) > room else ""
        counts = _counted([entry["state"] for _, entry, _ in runs])
        parts: list[Any] = [
            Text(f"{self.root}: {counts or 'no runs yet'}", style="bold"),
            *(Text(line) for line in campaigns),
            Text(),
            self._table(runs[:room]),
            *(Text(line, style="red") for line in problems),
            Text(f"{more}{'; ' if more else ''}q ends this view, not the runs", style="dim"),
        ]
        return Group(*parts)

    def _campaigns(self, problems: list[str]) -> Iterator[str]:
        for folder in find_campaigns(self.root):
            try:
                found = read_campaign(folder)
            except RetrainError as error:
                problems.append(str(error))
                continue
            states = ", ".join(f"{count} {state}" for state, count in sorted(found["runs"].items()))
            yield f"campaign {self._name(folder)}: {found['state']} ({states})"

    def _table(self, runs: Sequence[tuple[Path, dict[str, Any], Followed]]) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("run", "state"):
            table.add_column(name, overflow="ellipsis", no_wrap=True)
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("", width=10)
        for name in ("s/step", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("correct", width=CURVE_WIDTH, no_wrap=True)
        table.add_column(f"last {RUNNING_STEPS}", justify="right", no_wrap=True)
        table.add_column("warnings", overflow="ellipsis", no_wrap=True, style="yellow")
        for folder, entry, followed in runs:
            running = entry["pid"] is not None
            left = followed.seconds_left(entry["max_steps"] - entry["step"]) if running else None
            table.add_row(
                Text(self._name(folder)),
                Text(entry["state"], style="green" if running else "red" if entry["state"] == "failed" else ""),
                f"{entry['step']}/{entry['max_steps']}",
                ProgressBar(total=max(1, entry["max_steps"]), completed=entry["step"], width=10),
                number(entry["seconds_per_step"]),
                "-" if left is None else clock(left),
                sparkline(followed.rates, CURVE_WIDTH),
                percent(entry["running_correct_rate"]),
                Text(", ".join(followed.warnings)),
            )
        return table

    def _name(self, folder: Path) -> str:
        return str(folder.relative_to(self.root)) if folder != self.root else folder.resolve().name


def sparkline(rates: Sequence[float | None], width: int) -> str:
    """Shares in [0, 1] over time, in at most `width` bars from 0 to 1; each is the mean of the steps it stands for."""
    bars = []
    count = min(width, len(rates))
    for i in range(count):
        part = [rate for rate in rates[i * len(rates) // count : (i + 1) * len(rates) // count] if rate is not None]
        mean = sum(part) / len(part) if part else None
        bars.append(" " if mean is None else BARS[min(int(mean * len(BARS)), len(BARS) - 1)])
    return "".join(bars)


def watch(root: Path, console: Console | None = None) -> int:
    """Show the runs below `root` until q or Ctrl-C. Raises ConfigError where there is no terminal."""
    console = console or Console()
    if not (console.is_terminal and sys.stdin.isatty()):
        raise ConfigError(
            "status: --watch needs a terminal; without it, the runs are listed once (--json for programs)"
        )
    watcher = Watcher(root)
    with (
        suppress(KeyboardInterrupt),
        _keys() as pressed,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        live.update(watcher.screen(console.height), refresh=True)
        while pressed(SECONDS) not in ("q", "Q"):
            live.update(watcher.screen(console.height), refresh=True)
    return 0


@contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds for a key and returns it, "" for none. Nothing typed is shown."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([terminal], [], [], seconds)
        # A terminal that is gone reads as the end of the file.
        return os.read(terminal, 1).decode(errors="replace") or "q" if ready else ""

    try:
        tty.setcbreak(terminal)
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _counted(states: Sequence[str]) -> str:
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
