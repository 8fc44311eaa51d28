"""Two run folders, bit for bit: metrics that are not measured, generations, adapters, optimizer and random streams."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from retrain.training import durable
from retrain.training.checkpoint import CHECKPOINTS, EXTENTS
from retrain.training.folder import CONFIG, LOCK, METADATA, METRICS
from retrain.training.metrics import MEASURED

# Say when, where and in how many sessions, or are checksums of what does; the checksums are checked, not compared.
UNEQUAL = {LOCK, METADATA, EXTENTS, durable.MANIFEST}


def differences(a: Path, b: Path, *, config: bool = True, but: Collection[Path] = ()) -> list[str]:
    """What differs between two finished runs, a line each; [] where they are the same run.

    Every file counts, and so does one that only one of them has. config: whether theirs are to agree as well, but for
    `log_dir`. but: folders of theirs, relative to both, that do not count.
    """
    names = [{str(name) for name in _files(run) if name.parent not in but} for run in (a, b)]
    found = [f"{name}: only in one of the two" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        kind = Path(name).name
        if kind not in UNEQUAL and (config or kind != CONFIG) and _content(a / name) != _content(b / name):
            found.append(f"{name}: differs")
    for run in (a, b):
        for folder in sorted((run / CHECKPOINTS).iterdir()):
            problem = durable.damage(folder)
            found += [f"{folder}: {problem}"] if problem and folder.relative_to(run) not in but else []
    return found


def _files(run: Path) -> list[Path]:
    return [path.relative_to(run) for path in run.rglob("*") if path.is_file()]


def _content(path: Path) -> Any:
    if path.name == METRICS:
        return [unmeasured(row) for row in lines(path)]
    if path.name == CONFIG:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        values["logging"].pop("log_dir", None)
        return values
    return path.read_bytes()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def unmeasured(row: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without what a clock or the operating system says."""
    return {key: value for key, value in row.items() if key not in MEASURED}
