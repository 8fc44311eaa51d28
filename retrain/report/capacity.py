"""What the machine gives: tokens per second over the completions of a step, with the law that was fitted to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from retrain.backpressure.usl import Usl
from retrain.report.charts import MOST_GROUPS, numbers

if TYPE_CHECKING:
    from retrain.report.gather import Content, RunPart

CURVE_POINTS = 60


def capacity_charts(content: Content) -> Iterator[dict[str, Any]]:
    """Tokens per second over the completions of a step, with the fitted law; of runs with `[backpressure]`."""
    measured = [run for run in content.runs if run.records.throughput]
    series = [part for slot, run in enumerate(measured[:MOST_GROUPS]) for part in _capacity(run, slot)]
    if series:
        yield {
            "section": "speed",
            "kind": "points",
            "title": "Throughput and concurrency",
            "x": "completions of a step",
            "unit": "",
            "note": "Tokens per second of measured steps, and the Universal Scalability Law of the run's last fit.",
            "series": series,
        }


def _capacity(run: RunPart, slot: int) -> Iterator[dict[str, Any]]:
    p, x = (np.array(values, dtype=np.float64) for values in zip(*run.records.throughput, strict=True))
    yield {"name": run.label, "slot": slot, "x": numbers(p), "y": numbers(x), "points": True}
    if run.records.law is not None:
        law, at = Usl(*run.records.law), np.linspace(1, p.max() * 1.1, CURVE_POINTS)
        fitted = np.array([law.throughput(value) for value in at])
        yield {"name": f"{run.label}: fitted", "slot": slot, "x": numbers(at), "y": numbers(fitted)}
