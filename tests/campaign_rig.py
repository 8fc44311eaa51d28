"""Campaigns for the tests: a small config, and the folder that a campaign leaves behind, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retrain.campaign.manifest import RUNS, Manifest, RunEntry
from retrain.config import Config, load_config, run_matrix, to_dict
from runs import SMALL

CAMPAIGN = """
[campaign]
seeds = [11]
parallel = true
max_workers = 2
[[campaign.conditions]]
advantage_mode = "grpo"
transform_mode = "none"
[[campaign.conditions]]
name = "sepa"
"""
BROKEN = """
[campaign]
seeds = [11]
[[campaign.conditions]]
name = "broken"
overrides = { "model.model" = "./nothing-here" }
"""


def write_campaign(folder: Path, extra: str = CAMPAIGN) -> Path:
    """A config whose campaigns go below folder/logs."""
    folder.mkdir(exist_ok=True)
    path = folder / "campaign.toml"
    path.write_text(SMALL.replace("{log_dir}", str(folder / "logs")) + extra, encoding="utf-8")
    return path


def manifest_of(config: Config, **states: str) -> Manifest:
    """As `open_manifest` makes it; states: of runs by name, else finished."""
    assert config.campaign is not None
    matrix = run_matrix(config)
    return Manifest(
        config=to_dict(config),
        runs={run.name: RunEntry(run.condition, run.seed, states.get(run.name, "finished")) for run in matrix},  # type: ignore[arg-type]
        conditions=list(dict.fromkeys(run.condition for run in matrix)),
        seeds=list(config.campaign.seeds),
        max_steps=matrix[0].config.training.max_steps,
        created="2026-11-20T20:00:00+00:00",
        version="0.1.0",
        git_commit=None,
    )


def finished_campaign(folder: Path, rates: dict[str, list[float | None]], config: Config, **states: str) -> Manifest:
    """A campaign's folder: manifest, and metrics.jsonl of the runs named in `rates`, a rate for each step."""
    manifest = manifest_of(config, **states)
    for name, values in rates.items():
        run = folder / RUNS / name
        run.mkdir(parents=True)
        lines = [json.dumps({"step": step, "correct_rate": rate}) for step, rate in enumerate(values, start=1)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    manifest.write(folder)
    return manifest


def load(folder: Path, extra: str = CAMPAIGN, **overrides: Any) -> Config:
    return load_config(
        write_campaign(folder, extra), {key.replace("__", "."): value for key, value in overrides.items()}
    )
