"""The charts as data: which series each has, and their points. The script of the page only draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import stdtrit

from retrain.report.plans import CONSTANT, PLANS, REWARD_PART, Plan, is_part

if TYPE_CHECKING:
    from retrain.report.gather import Content, RunPart
    from retrain.report.read import Curve

CONFIDENCE = 0.95
# Groups that are drawn: more lines than these nobody tells apart.
MOST_GROUPS = 16


def charts_over_steps(content: Content) -> Iterator[dict[str, Any]]:
    """Line charts of every plan that has a value, and of the parts of the reward."""
    groups = dict(list(content.groups.items())[:MOST_GROUPS])
    parts = sorted({key for run in content.runs for key in run.records.curves if is_part(key)})
    of_parts = Plan(
        "learning", "Parts of the reward", tuple((key, key.removeprefix(REWARD_PART)) for key in parts), note="Means."
    )
    for plan in (*PLANS, of_parts):
        # Several groups share a chart of one key; several keys share a chart of one group.
        for keys in [plan.keys] if len(groups) == 1 else [(pair,) for pair in plan.keys]:
            several = len(groups) > 1 and len(plan.keys) > 1
            title = f"{plan.title}: {keys[0][1]}" if several else plan.title
            series = list(_lines(groups, keys))
            if series and not _is_idle(keys, series):
                yield {
                    "section": plan.section,
                    "kind": "line",
                    "title": title,
                    "x": "step",
                    "unit": plan.unit,
                    "note": plan.note,
                    "series": series,
                }


def _is_idle(keys: Sequence[tuple[str, str]], series: list[dict[str, Any]]) -> bool:
    values = {y for one in series for y in one["y"] if y is not None}
    return all(key in CONSTANT for key, _ in keys) and len(values) < 2


def _lines(groups: dict[str, list[RunPart]], keys: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for i, (group, runs) in enumerate(groups.items()):
        for j, (key, called) in enumerate(keys):
            shown = [run for run in runs if key in run.records.curves and (run.pools or key != "sepa_lambda")]
            curves = [run.records.curves[key] for run in shown]
            if curves and any(np.isfinite(curve.mean).any() for curve in curves):
                name = group if len(groups) > 1 else called
                yield {"name": name, "slot": i + j} | _line(runs[0].records.steps, curves)


def _line(steps: np.ndarray, curves: Sequence[Curve]) -> dict[str, Any]:
    """Mean over the seeds with its interval; of one run the line, and the range of the steps behind a point."""
    mean, low, high, count = band([curve.mean for curve in curves])
    if len(curves) == 1:
        low, high = curves[0].low, curves[0].high
    there = np.isfinite(mean)
    return {
        "x": steps[there].tolist(),
        "y": numbers(mean[there]),
        "lo": numbers(low[there]),
        "hi": numbers(high[there]),
        "n": count[there].tolist(),
    }


def band(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper end of the 95% t interval, and number of seeds at each point, of curves [P] with NaN gaps.

    The mean is over the seeds that have the point; with fewer than two of them there is no interval (NaN).
    """
    values = np.stack(curves)
    known = np.isfinite(values)
    count = known.sum(axis=0)
    none = np.full(values.shape[1], np.nan)
    mean = np.divide(np.where(known, values, 0).sum(axis=0), count, out=none.copy(), where=count > 0)
    squares = np.where(known, values - np.where(count > 0, mean, 0), 0) ** 2
    several = count > 1
    error = np.sqrt(np.divide(squares.sum(axis=0), count * (count - 1.0), out=none.copy(), where=several))
    half = stdtrit(np.where(several, count - 1, 1), (1 + CONFIDENCE) / 2) * error
    return mean, mean - half, mean + half, count


def histograms(content: Content) -> Iterator[dict[str, Any]]:
    """Distributions of rewards and lengths: of one group at its beginning and end, of several at their ends."""
    groups = dict(list(content.groups.items())[:MOST_GROUPS])
    wanted: tuple[tuple[str, str, Callable[[tuple[float | None, int]], float | None]], ...] = (
        ("Rewards", "reward", lambda pair: pair[0]),
        ("Lengths", "tokens of a completion", lambda pair: pair[1]),
    )
    for title, x, pick in wanted:
        samples: dict[str, list[float]] = {}
        for group, runs in groups.items():
            ends = {"last tenth of the steps": [pair for run in runs for pair in run.records.last_ends]}
            if len(groups) == 1:
                ends = {"first tenth of the steps": [pair for run in runs for pair in run.records.first_ends]} | ends
            for name, pairs in ends.items():
                values = [value for value in map(pick, pairs) if value is not None]
                if values:
                    samples[name if len(groups) == 1 else group] = values
        if samples:
            when = "" if len(groups) == 1 else "In the last tenth of the steps. "
            sizes = ", ".join(f"{len(values):,}" for values in samples.values())
            yield {
                "section": "distributions",
                "kind": "steps",
                "title": title,
                "x": x,
                "unit": "%",
                "note": f"{when}Share of the completions; {sizes} of them are counted.",
                "series": list(_histogram(samples)),
            }


def _histogram(samples: dict[str, list[float]], bins: int = 24) -> Iterator[dict[str, Any]]:
    """Shares of each sample in equal bins over the range of all. x: the bins' edges, one more than shares."""
    low, high = min(map(min, samples.values())), max(map(max, samples.values()))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    for slot, (name, values) in enumerate(samples.items()):
        counts = np.histogram(values, edges)[0]
        yield {"name": name, "slot": slot, "x": numbers(edges), "y": numbers(counts / len(values))}


def numbers(values: np.ndarray) -> list[float | None]:
    """For JSON: four significant digits, null for what does not exist."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
