"""Which campaigns lie below a folder, and how each stands."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retrain.campaign.manifest import RUNS, holds_campaign, read_manifest
from retrain.training.folder import owner


def find_campaigns(root: Path) -> Iterator[Path]:
    """Folders at or below `root` that hold a campaign, in the order of their names; their runs are not entered."""
    for folder, inner, _ in os.walk(root):
        inner.sort()
        if holds_campaign(Path(folder)):
            inner.clear()
            yield Path(folder)


def read_campaign(folder: Path) -> dict[str, Any]:
    """What its manifest says. state: running, or how it ended; "stopped" when it died without a word. runs: how many
    are in which state. Raises RetrainError where the manifest is damaged or of another version."""
    manifest = read_manifest(folder)
    pid = owner(folder)
    state = "running" if pid is not None else "stopped" if manifest.state == "running" else manifest.state
    return {
        "folder": str(folder),
        "state": state,
        "pid": pid,
        "conditions": manifest.conditions,
        "seeds": manifest.seeds,
        "max_steps": manifest.max_steps,
        "runs": Counter(entry.state for entry in manifest.runs.values()),
        "runs_folder": str(folder / RUNS),
    }
