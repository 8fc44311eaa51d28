"""A run's records in little: metrics in at most so many points, the ends of its generations, some of its credit.

Each file is read once, line by line, and nothing of it is kept but what is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retrain.training.folder import CREDIT, GENERATIONS, METRICS
from retrain.training.records import last_row, last_rows, rows

# Of the generations, as many bytes from either end: what lies between is not read.
END_BYTES = 8 << 20
# Of these at most so many completions from either end, and no more than a tenth of the steps (at least one).
END_COMPLETIONS = 2000
# Tokens of a completion that are kept.
MOST_TOKENS = 1500


@dataclass
class Curve:
    """One key of metrics.jsonl over P points: mean, least and largest value of the steps that a point stands for.

    All float64 [P], NaN where no step has a value.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass
class Warned:
    """A warning of the run: in how many steps it was given, the first and the last of them."""

    count: int
    first: int
    last: int


@dataclass
class Records:
    """steps: float64 [P], the middle of the steps that a point stands for; per_point: how many these are.

    curves: by key. throughput: (completions of a step, tokens per second) of one step of each point; law: (scale,
    sigma, kappa) of the last fit to it. last: the newest line. first_ends, last_ends: (reward, tokens) of the first and
    the last completions. credit: lines of credit.jsonl.
    """

    steps: np.ndarray
    per_point: int
    curves: dict[str, Curve]
    throughput: list[tuple[int, float]]
    law: tuple[float, float, float] | None
    last: dict[str, Any]
    warnings: dict[str, Warned]
    first_ends: list[tuple[float | None, int]]
    last_ends: list[tuple[float | None, int]]
    credit: list[dict[str, Any]] = field(default_factory=list)


def last_step(log_dir: Path) -> int:
    return (last_row(log_dir / METRICS) or {}).get("step", 0)


def read_records(
    log_dir: Path, last: int, *, most_points: int, credit_steps: int, shown: Callable[[str], bool]
) -> Records:
    """The records of one run.

    last: the last step of all runs that are shown together, so that their points agree. credit_steps: of so many steps,
    spread evenly, the credit is kept. shown: whether a key is wanted as a curve.
    """
    per_point = max(1, math.ceil(last / most_points))
    points = max(1, math.ceil(last / per_point))
    sums: dict[str, np.ndarray] = {}
    throughput: dict[int, tuple[int, float]] = {}
    warnings: dict[str, Warned] = {}
    newest: dict[str, Any] = {}
    law = None
    for row in rows(log_dir / METRICS):
        point = min((row["step"] - 1) // per_point, points - 1)
        newest = row
        _add(sums, {key: value for key, value in row.items() if shown(key)}, point, points)
        if row.get("bp_throughput"):
            throughput[point] = (row["bp_p"], row["bp_throughput"])
        if row.get("bp_scale") is not None:
            law = (row["bp_scale"], row["bp_sigma"], row["bp_kappa"])
        for name in row.get("warnings") or ():
            seen = warnings.setdefault(str(name), Warned(0, row["step"], row["step"]))
            seen.count, seen.last = seen.count + 1, row["step"]
    first, final = _ends(log_dir / GENERATIONS, newest.get("step", 0))
    return Records(
        steps=np.arange(points) * per_point + (per_point + 1) / 2,
        per_point=per_point,
        curves={key: _curve(total) for key, total in sums.items()},
        throughput=list(throughput.values()),
        law=law,
        last=newest,
        warnings=warnings,
        first_ends=first,
        last_ends=final,
        credit=_credit(log_dir / CREDIT, credit_steps),
    )


def _add(sums: dict[str, np.ndarray], row: dict[str, Any], point: int, points: int) -> None:
    """Count a line's numbers: sums[key] is [4, P] of sum, count, least, largest."""
    for key, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            total = sums.get(key)
            if total is None:
                total = sums[key] = np.zeros((4, points))
                total[2], total[3] = math.inf, -math.inf
            total[0, point] += value
            total[1, point] += 1
            total[2, point] = min(total[2, point], value)
            total[3, point] = max(total[3, point], value)


def _curve(total: np.ndarray) -> Curve:
    known = total[1] > 0
    mean = np.divide(total[0], total[1], out=np.full_like(total[0], np.nan), where=known)
    return Curve(mean, np.where(known, total[2], np.nan), np.where(known, total[3], np.nan))


def _ends(path: Path, steps: int) -> tuple[list[tuple[float | None, int]], list[tuple[float | None, int]]]:
    """(reward, tokens) of the completions of the first and of the last tenth of the steps, so far as they are read."""
    tenth = max(1, steps // 10)
    first, last = [], []
    for row in _head(path):
        if row["step"] > tenth or len(first) == END_COMPLETIONS:
            break
        first.append((row["reward"], row["num_tokens"]))
    for row in reversed(last_rows(path, END_BYTES)):
        if row["step"] <= steps - tenth or len(last) == END_COMPLETIONS:
            break
        last.append((row["reward"], row["num_tokens"]))
    return first, last


def _head(path: Path) -> Iterator[dict[str, Any]]:
    read = 0
    for row in rows(path):
        yield row
        read += len(row["completion"])
        if read > END_BYTES:
            return


def _credit(path: Path, steps: int) -> list[dict[str, Any]]:
    """The lines of at most `steps` steps (or none), spread evenly, the first and the last among them."""
    newest = last_row(path)
    if newest is None or steps == 0:
        return []
    kept: dict[int, list[dict[str, Any]]] = {}
    gap = (newest["step"] - 1) / max(1, steps - 1)
    wanted = {newest["step"], *(round(1 + i * gap) for i in range(steps - 1))}
    for row in rows(path):
        # The first step at or after each that is wanted: there is none of a step without training.
        if row["step"] in kept or any(step <= row["step"] for step in wanted):
            wanted = {step for step in wanted if step > row["step"]}
            kept.setdefault(row["step"], []).append(_short(row))
    return [row for found in kept.values() for row in found]


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """With the first tokens only; cut: how many are left out."""
    count = len(row["tokens"])
    per_token = {key: row[key][:MOST_TOKENS] for key in ("tokens", "advantages", "uncertainty")}
    planning = [place for place in row["planning"] if place < MOST_TOKENS]
    return row | per_token | {"planning": planning, "cut": max(0, count - MOST_TOKENS)}
