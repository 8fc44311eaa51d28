"""What a folder holds: its runs, put into groups that differ in nothing but the seed, and a campaign's results."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrain.report.plans import is_shown
from retrain.report.read import Records, last_step, read_records
from retrain.training.folder import CONFIG
from retrain.training.overview import find_runs, read_run
from retrain.types import ConfigError, RetrainError

MANIFEST, RESULTS, SQUEEZE = "manifest.json", "results.json", "squeeze.json"
# Sections and keys that say where a run is written and how it is executed, not which experiment it is.
NO_DIFFERENCE = ("logging", "resume", "backend", "campaign")
SEED = "training.seed"
# Steps that follow one another are taken together until a curve has at most so many points.
MOST_POINTS = 400
# So many runs are read; of more, the page says how many it leaves out.
MOST_RUNS = 200
# Of so many runs the completions are shown, and of these together so many steps (but two of each at least).
MOST_RUNS_WITH_CREDIT = 40
MOST_CREDIT_STEPS = 60


@dataclass(frozen=True)
class RunPart:
    """One run. facts: as `retrain.training.overview.read_run` has them. label: its name below the folder."""

    path: Path
    label: str
    group: str
    seed: int
    facts: dict[str, Any]
    records: Records

    @property
    def pools(self) -> bool:
        """Whether SEPA's lambda means anything here."""
        return "sepa" in self.facts["condition"]


@dataclass(frozen=True)
class Content:
    """What the page is about. groups: name -> its runs. problems: what could not be read. squeeze: file -> analysis."""

    folder: Path
    groups: dict[str, list[RunPart]]
    last_step: int
    results: dict[str, Any] | None = None
    manifest: dict[str, Any] | None = None
    squeeze: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[RunPart]:
        return [run for group in self.groups.values() for run in group]


def gather(folder: Path) -> Content:
    """Read `folder`. Raises ConfigError where it holds no run, RetrainError where none of them can be read."""
    if not folder.is_dir():
        raise ConfigError(f"report: {folder}: no such folder")
    paths = list(find_runs(folder))
    if not paths:
        raise ConfigError(f"report: there is no run in {folder} or below it")
    problems = [f"{len(paths) - MOST_RUNS} more runs are left out"] if len(paths) > MOST_RUNS else []
    manifest = _json(folder / MANIFEST, problems)
    found = []
    for path in paths[:MOST_RUNS]:
        try:
            found.append((path, read_run(path), _settings(path), last_step(path)))
        except RetrainError as error:
            problems.append(str(error))
    last = max((step for *_, step in found), default=0)
    names = _group_names([(path, settings) for path, _, settings, _ in found], manifest)
    groups: dict[str, list[RunPart]] = {name: [] for name in _order(names, manifest)}
    credit_steps = max(2, MOST_CREDIT_STEPS // min(len(found) or 1, MOST_RUNS_WITH_CREDIT))
    for i, ((path, facts, settings, _), name) in enumerate(zip(found, names, strict=True)):
        try:
            records = read_records(
                path,
                last,
                most_points=MOST_POINTS,
                credit_steps=credit_steps if i < MOST_RUNS_WITH_CREDIT else 0,
                shown=is_shown,
            )
        except RetrainError as error:
            problems.append(str(error))
            continue
        label = path.relative_to(folder).as_posix()
        label = path.resolve().name if label == "." else label.removeprefix("runs/")
        groups[name].append(RunPart(path, label, name, settings[SEED], facts, records))
    groups = {name: runs for name, runs in groups.items() if runs}
    if not groups:
        raise RetrainError("\n".join(problems))
    return Content(
        folder=folder,
        groups=groups,
        last_step=last,
        results=_json(folder / RESULTS, problems),
        manifest=manifest,
        squeeze=_squeezes(folder, groups, manifest, problems),
        problems=problems,
    )


def _settings(path: Path) -> dict[str, Any]:
    """`section.key` -> value of what makes the experiment, and its seed."""
    tables = tomllib.loads((path / CONFIG).read_text(encoding="utf-8"))
    flat = {
        f"{section}.{key}": value
        for section, table in tables.items()
        if section not in NO_DIFFERENCE
        for key, value in table.items()
    }
    return {SEED: -1} | flat


def _group_names(runs: list[tuple[Path, dict[str, Any]]], manifest: dict[str, Any] | None) -> list[str]:
    """The group of each run: its condition in a campaign, elsewhere the algorithm and the keys in which runs differ."""
    planned = (manifest or {}).get("runs", {})
    if manifest is not None and all(path.name in planned for path, _ in runs):
        return [str(planned[path.name]["condition"]) for path, _ in runs]
    keys = dict.fromkeys(key for _, settings in runs for key in settings)
    modes = ("algorithm.advantage_mode", "algorithm.transform_mode")
    differ = [
        key
        for key in keys
        if key not in (SEED, *modes) and len({json.dumps(settings.get(key)) for _, settings in runs}) > 1
    ]
    return [
        " ".join(
            [
                "+".join(str(settings.get(mode, "")) for mode in modes),
                *(f"{key.partition('.')[2]}={settings.get(key)}" for key in differ),
            ]
        )[:120]
        for _, settings in runs
    ]


def _order(names: list[str], manifest: dict[str, Any] | None) -> list[str]:
    """Groups as the campaign names them, else as they are found."""
    planned = (manifest or {}).get("conditions", [])
    return sorted(dict.fromkeys(names), key=lambda name: planned.index(name) if name in planned else len(planned))


def _squeezes(
    folder: Path, groups: dict[str, list[RunPart]], manifest: dict[str, Any] | None, problems: list[str]
) -> dict[str, dict[str, Any]]:
    """Rank analyses: squeeze.json of the folder or of a run, and the one in a campaign's manifest."""
    found = {}
    for label, place in [
        ("", folder),
        *((run.label, run.path) for runs in groups.values() for run in runs if run.path != folder),
    ]:
        analysis = _json(place / SQUEEZE, problems)
        if analysis is not None:
            found[label or folder.resolve().name] = analysis
    squeezed = (manifest or {}).get("squeeze") or {}
    if isinstance(squeezed.get("analysis"), dict):
        found.setdefault(str(squeezed.get("run", "campaign")), squeezed["analysis"])
    return found


def _json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The object in a file; None where there is none. One that is damaged is a problem, not silence."""
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
        problems.append(f"{path} is left out: it does not hold an object")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        problems.append(f"{path} is left out: it cannot be read ({error})")
    return None
