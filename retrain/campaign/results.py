"""results.json: what the runs' records say, compared. The same records give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retrain.campaign import statistics
from retrain.campaign.manifest import RUNS, Manifest
from retrain.campaign.statistics import ALPHA, CONFIDENCE, POWER, Estimate
from retrain.training.folder import METRICS
from retrain.training.records import rows

RESULTS = "results.json"
# The first is the one that a campaign is judged by.
MEASURES = {
    "last_tenth": "correct rate, mean of the last tenth of the steps",
    "whole_run": "correct rate, mean of all steps (area under the curve)",
}
DIFFERENCE = 0.01  # one point of the correct rate
CANNOT_TELL = "cannot tell"

# condition -> {seed: value}, in the order of the campaign
Values = dict[str, dict[int, float]]


def measure(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The content of results.json, from the finished runs of the campaign in `folder`."""
    measured = {
        name: run_measures(folder / RUNS / name / METRICS, manifest.max_steps)
        for name, entry in manifest.runs.items()
        if entry.state == "finished"
    }
    runs = {name: {**asdict_run(manifest, name), **found} for name, found in measured.items() if found}
    results = {
        "baseline": manifest.conditions[0],
        "conditions": manifest.conditions,
        "seeds": manifest.seeds,
        "max_steps": manifest.max_steps,
        "last_steps": last_steps(manifest.max_steps),
        "confidence": CONFIDENCE,
        "power": POWER,
        "difference": DIFFERENCE,
        "missing": missing(manifest, set(runs)),
        "runs": runs,
        "measures": {
            name: {"title": title, **compare(_values(manifest, runs, name))} for name, title in MEASURES.items()
        },
    }
    return {**results, "remarks": list(remarks(results))}


def asdict_run(manifest: Manifest, name: str) -> dict[str, Any]:
    entry = manifest.runs[name]
    return {"condition": entry.condition, "seed": entry.seed}


def last_steps(max_steps: int) -> int:
    """Steps in the last tenth, rounded up."""
    return math.ceil(max_steps / 10)


def run_measures(path: Path, max_steps: int) -> dict[str, float] | None:
    """Both measures of one run's metrics; a step whose rewards all failed has no rate. None where no step has one."""
    rates = [(row["step"], row["correct_rate"]) for row in rows(path) if row["correct_rate"] is not None]
    last = [rate for step, rate in rates if step > max_steps - last_steps(max_steps)]
    if not last:
        return None
    return {"last_tenth": math.fsum(last) / len(last), "whole_run": math.fsum(rate for _, rate in rates) / len(rates)}


def missing(manifest: Manifest, measured: set[str]) -> dict[str, str]:
    """Run -> why it has no part in the results."""
    return {
        name: entry.state if entry.state != "finished" else "no step of the last tenth has a reward"
        for name, entry in manifest.runs.items()
        if name not in measured
    }


def compare(values: Values) -> dict[str, Any]:
    """An estimate for each condition, and each but the first against the first, over the seeds that both have."""
    baseline, *others = values
    pairs = {name: sorted(values[baseline].keys() & values[name].keys()) for name in others}
    found = {
        name: statistics.compare([values[name][s] for s in seeds], [values[baseline][s] for s in seeds])
        for name, seeds in pairs.items()
    }
    holm_t = statistics.holm([one.p_t for one in found.values()])
    holm_flip = statistics.holm([one.p_flip for one in found.values()])
    comparisons = {}
    for (name, one), p_t, p_flip in zip(found.items(), holm_t, holm_flip, strict=True):
        comparisons[name] = {
            "seeds": pairs[name],
            **_within(one.difference, -1.0),
            "p_t": one.p_t,
            "p_t_holm": p_t,
            "p_flip": one.p_flip,
            "p_flip_holm": p_flip,
            "seeds_needed": statistics.seeds_needed(one.difference.sd, DIFFERENCE, ALPHA / len(others)),
            "verdict": verdict(one.difference.mean, p_t),
        }
    conditions = {
        name: {
            "seeds": sorted(by_seed),
            **_within(statistics.estimate([by_seed[seed] for seed in sorted(by_seed)]), 0.0),
        }
        for name, by_seed in values.items()
    }
    return {"conditions": conditions, "comparisons": comparisons}


def remarks(results: dict[str, Any]) -> Iterator[str]:
    """What a reader must know to read the tables rightly."""
    for name, why in results["missing"].items():
        yield f"{name} is left out ({why}): comparisons use the seeds that both conditions have"
    if len(results["seeds"]) < 2:
        yield "one seed: no interval and no test exists; name more [campaign] seeds"
    comparisons = [one for measure in results["measures"].values() for one in measure["comparisons"].values()]
    if not comparisons:
        return
    if not any(one["n"] for one in comparisons):
        yield "no seed is finished in two conditions: there is nothing to compare"
        return
    if any(one["n"] > 1 and one["sd"] == 0 for one in comparisons):
        yield "differences that are the same for every seed have no interval: how much they vary is not known"
    yield "p: paired t test; (flips): sign-flip permutation test; both corrected for the number of conditions (Holm)"
    yield (
        f"seeds needed: to see a difference of {100 * results['difference']:g} point with "
        f"{results['power']:.0%} power, as much as the differences vary here"
    )
    if any(one["verdict"] == CANNOT_TELL for one in comparisons):
        yield f'"{CANNOT_TELL}": the data do not decide; it does not mean that there is no effect'
    least = min(2 ** (1 - one["n"]) for one in comparisons if one["n"])
    if least > 1 - results["confidence"]:
        yield f"with so few seeds the permutation test cannot give less than p = {least:g}, whatever the runs do"


def _within(estimate: Estimate, lowest: float) -> dict[str, Any]:
    """As plain values, the interval cut where no rate (from 0 to 1) or difference of rates can lie."""
    values = asdict(estimate)
    if estimate.low is not None and estimate.high is not None:
        values |= {"low": max(lowest, estimate.low), "high": min(1.0, estimate.high)}
    return values


def verdict(mean: float | None, p: float | None) -> str:
    """`higher` or `lower` where the corrected paired t test says so; else the data cannot tell: it may be either."""
    if mean is None or p is None or p > ALPHA:
        return CANNOT_TELL
    return "higher" if mean > 0 else "lower"


def _values(manifest: Manifest, runs: Mapping[str, Mapping[str, Any]], measure: str) -> Values:
    values: Values = {condition: {} for condition in manifest.conditions}
    for run in runs.values():
        values[run["condition"]][run["seed"]] = run[measure]
    return values
