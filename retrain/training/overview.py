"""Which runs lie below a folder, and how each stands: the ends of their records. Torch-free, no waiting."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retrain.training.checkpoint import named
from retrain.training.folder import CONFIG, METADATA, METRICS, owner
from retrain.training.records import last_row
from retrain.types import RetrainError


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
        "warnings": last.get("warnings", []),
        "last_checkpoint": named(log_dir),
    }
