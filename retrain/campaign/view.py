"""The terminal view of a campaign: a live panel of the runs under way, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from retrain.campaign.manifest import Manifest
from retrain.tracking.console import clock, percent
from retrain.training.folder import METRICS
from retrain.training.records import last_row

# Width of what is written to a file or a pipe, so that tables are not folded.
WIDE = 200


class View:
    """Use as a context manager, so that the live panel is taken down. running: name -> (folder, time it began)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDE)
        self._live = (
            Live(console=self.console, refresh_per_second=2, transient=True) if self.console.is_interactive else None
        )

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, emoji=False, soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        self.console.print(renderable)

    def update(self, manifest: Manifest, running: Mapping[str, tuple[Path, float]]) -> None:
        if self._live is not None:
            self._live.update(_panel(manifest, running))


def _panel(manifest: Manifest, running: Mapping[str, tuple[Path, float]]) -> Panel:
    table = Table.grid(padding=(0, 2))
    for name, (folder, began) in running.items():
        row = last_row(folder / METRICS) or {}
        step = row.get("step", 0)
        table.add_row(
            Text(name),
            ProgressBar(total=manifest.max_steps, completed=step, width=24),
            f"{step}/{manifest.max_steps}",
            f"correct {percent(row.get('running_correct_rate'))}",
            clock(time.monotonic() - began),
        )
    return Panel(Group(table), title=counts(manifest), title_align="left")


def counts(manifest: Manifest) -> str:
    """`9 of 15 runs finished, 1 failed, 2 running`."""
    others = [f"{manifest.count(state)} {state}" for state in ("failed", "running") if manifest.count(state)]
    return ", ".join([f"{manifest.count('finished')} of {len(manifest.runs)} runs finished", *others])
