"""manifest.json: what a campaign is, and how each of its runs stands. It is replaced whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from retrain.training import durable
from retrain.types import RetrainError

MANIFEST = durable.MANIFEST
RUNS = "runs"
FORMAT = 1

RunState = Literal["waiting", "running", "finished", "failed", "interrupted"]
State = Literal["running", "finished", "failed", "interrupted"]

# What may differ when a campaign goes on: where and how many at a time, never what is computed.
CHANGEABLE = {
    "campaign.parallel",
    "campaign.max_workers",
    "campaign.stagger_seconds",
    "campaign.executor",
    "campaign.ray_address",
    "backend.devices",
    "backend.adapter_path",
    "inference.url",
    "logging.log_dir",
}


@dataclass
class RunEntry:
    """One run. error: the last lines it wrote, where it failed. Times are UTC, None while there is none."""

    condition: str
    seed: int
    state: RunState = "waiting"
    started: str | None = None
    ended: str | None = None
    error: str | None = None


@dataclass
class Manifest:
    """What manifest.json holds. config: the resolved config, by section and key. squeeze: {"run", "analysis"} or
    {"run", "error"} once the first finished run's adapter was analysed."""

    config: dict[str, Any]
    runs: dict[str, RunEntry]
    conditions: list[str]
    seeds: list[int]
    max_steps: int
    created: str
    version: str
    git_commit: str | None
    state: State = "running"
    squeeze: dict[str, Any] | None = None
    config_sha256: str = field(init=False)

    def __post_init__(self) -> None:
        self.config_sha256 = config_digest(self.config)

    def write(self, folder: Path) -> None:
        values = asdict(self)
        config = values.pop("config")  # the longest comes last
        durable.write_sealed_json(folder / MANIFEST, {"format": FORMAT, **values, "config": config})

    def count(self, state: RunState) -> int:
        return sum(entry.state == state for entry in self.runs.values())


def read_manifest(folder: Path) -> Manifest:
    """Raises RetrainError where the file is missing, damaged or of another version."""
    path = folder / MANIFEST
    try:
        values = durable.read_sealed_json(path)
        if values.pop("format") != FORMAT:
            raise RetrainError(f"{path} was written by another version of retrain; go on with that version")
        del values["config_sha256"]
        runs = {name: RunEntry(**entry) for name, entry in values.pop("runs").items()}
        return Manifest(runs=runs, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RetrainError(
            f"{path} is damaged, or not the manifest of a campaign ({type(error).__name__}: {error}). Put a copy back, "
            "or begin in another folder"
        ) from None


def holds_campaign(folder: Path) -> bool:
    """Whether `folder` is that of a campaign. A checkpoint has a file of the same name, but no runs beside it."""
    return (folder / MANIFEST).is_file() and (folder / RUNS).is_dir()


def config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of what decides a campaign's numbers: everything but `CHANGEABLE`."""
    decisive = {path: value for path, value in flat(config) if path not in CHANGEABLE}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value there, value here) of what differs and may not; None where one of them has no such key."""
    before, after = dict(flat(was)), dict(flat(now))
    keys = [key for key in dict.fromkeys([*before, *after]) if key not in CHANGEABLE]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """("campaign.conditions[0].name", value) of every leaf; a list of plain values is one."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from flat(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{path}[{i}]")
    else:
        yield path, value
