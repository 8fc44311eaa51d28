"""Run folders and campaigns as a run leaves them, made by hand: what a report reads, without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrain.campaign.results import MEASURES, compare, remarks
from retrain.config import dump_toml
from retrain.config.build import build

# The last tenth's correct rate of each condition by seed, as results.json of `make_campaign` has it.
MEASURED = ({1: 0.5, 2: 0.52, 3: 0.54}, {1: 0.48, 2: 0.55, 3: 0.56})
HOSTILE = '</script><img src=x onerror="document.title=1"><!--&lt;script>alert(1)</script>'


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics_row(step: int, **keys: Any) -> dict[str, Any]:
    return {
        "step": step,
        "condition": "grpo+gtpo_sepa",
        "loss": -0.1 * step,
        "grad_norm": 0.5,
        "mean_reward": 0.5,
        "correct_rate": 0.5,
        "running_correct_rate": 0.5,
        "eval_correct_rate": None,
        "entropy_mean": 0.4,
        "exec_entropy_mean": 0.3,
        "plan_entropy_mean": 0.9,
        "planning_fraction": 0.1,
        "sepa_lambda": step / 100,
        "sepa_gate_open": True,
        "batch_size": 2,
        "group_size": 4,
        "tokens_per_s": 100.0,
        "step_time_s": 1.5,
        **dict.fromkeys(("bp_p", "bp_throughput", "bp_scale", "bp_sigma", "bp_kappa")),
        "warnings": [],
    } | keys


def generation_row(step: int, reward: float | None, tokens: int) -> dict[str, Any]:
    return {"step": step, "prompt": "2 + 3?", "completion": "5", "reward": reward, "num_tokens": tokens}


def credit_row(step: int, **keys: Any) -> dict[str, Any]:
    return {
        "step": step,
        "prompt_index": step,
        "completion_index": 0,
        "prompt": "What is 2 + 3?",
        "reference": "5",
        "reward": 1.0,
        "advantage": 0.75,
        "finish_reason": "stop",
        "sepa_lambda": 0.5,
        "tokens": ["let", " me", " think", "\n5"],
        "advantages": [0.5, -1.0, 0.25, None],
        "uncertainty": [0.1, 2.0, 0.4, None],
        "planning": [0, 1],
    } | keys


def make_run(
    log_dir: Path,
    *,
    steps: int = 10,
    seed: int = 1,
    mode: str = "grpo",
    row: Callable[[int], dict[str, Any]] = metrics_row,
    generations: list[dict[str, Any]] | None = None,
    credit: list[dict[str, Any]] | None = None,
    status: str = "finished",
    overrides: dict[str, Any] | None = None,
) -> Path:
    log_dir.mkdir(parents=True)
    values = {
        "training.seed": seed,
        "training.max_steps": steps,
        "model.model": "builtin:tiny",
        "algorithm.advantage_mode": mode,
        "algorithm.transform_mode": "gtpo_sepa",
        "data.source": "arithmetic",
        "logging.log_dir": str(log_dir),
    }
    (log_dir / "config.toml").write_text(dump_toml(build({}, values | (overrides or {}))), encoding="utf-8")
    facts = {"condition": f"{mode}+gtpo_sepa", "model": "builtin:tiny", "sessions": [{"status": status}]}
    (log_dir / "metadata.json").write_text(json.dumps(facts))
    write_lines(log_dir / "metrics.jsonl", [row(step) for step in range(1, steps + 1)])
    default = [generation_row(step, step % 2, 10 + step) for step in range(1, steps + 1)]
    write_lines(log_dir / "generations.jsonl", default if generations is None else generations)
    write_lines(log_dir / "credit.jsonl", [credit_row(1), credit_row(steps)] if credit is None else credit)
    return log_dir


def make_campaign(folder: Path, *, seeds: tuple[int, ...] = (1, 2, 3), **keys: Any) -> Path:
    """Two conditions; maxrl's rates are a tenth above grpo's, and seeds differ."""
    conditions = ["grpo+gtpo_sepa", "maxrl+gtpo_sepa"]
    runs = {}
    for name in conditions:
        for seed in seeds:
            rate = (0.5 if name == conditions[0] else 0.6) + seed / 100
            make_run(
                folder / "runs" / f"{name}_s{seed}",
                seed=seed,
                mode=name.partition("+")[0],
                row=lambda step, rate=rate: metrics_row(step, running_correct_rate=rate, mean_reward=rate),
                **keys,
            )
            runs[f"{name}_s{seed}"] = {"condition": name, "seed": seed, "state": "finished"}
    manifest = {"conditions": conditions, "seeds": list(seeds), "runs": runs, "squeeze": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    measure = {"title": MEASURES["last_tenth"], **compare(dict(zip(conditions, MEASURED, strict=True)))}
    results = {
        "baseline": "grpo+gtpo_sepa",
        "conditions": conditions,
        "seeds": list(seeds),
        "confidence": 0.95,
        "power": 0.8,
        "difference": 0.01,
        "missing": {"maxrl+gtpo_sepa_s9": "failed"},
        "measures": {"last_tenth": measure},
    }
    (folder / "results.json").write_text(json.dumps({**results, "remarks": list(remarks(results))}))
    return folder
