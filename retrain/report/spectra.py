"""How much of an adapter each rank keeps: the spectra of `retrain squeeze`, as charts and a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from retrain.report.charts import numbers
from retrain.report.tables import table

if TYPE_CHECKING:
    from retrain.report.gather import Content


def spectra(content: Content) -> Iterator[dict[str, Any]]:
    """Mean over the layers at every rank, and the range from the worst layer to the best."""
    kept, sizes = [], []
    for slot, (name, analysis) in enumerate(content.squeeze.items()):
        rank = analysis["source_rank"]
        layers = analysis["layers"]
        kept.append(
            {"name": name, "slot": slot} | _over_layers([_filled(one["variance"], rank, 1.0) for one in layers])
        )
        largest = [max(one["singular_values"]) or 1.0 for one in layers]
        sizes.append(
            {"name": name, "slot": slot}
            | _over_layers(
                [_filled(one["singular_values"], rank, 0.0) / top for one, top in zip(layers, largest, strict=True)]
            )
        )
    for title, note, series in (
        ("Variance kept", "Share of the update's variance that a rank keeps.", kept),
        ("Singular values", "Of each layer's update, relative to its largest.", sizes),
    ):
        if series:
            yield {
                "section": "squeeze",
                "kind": "line",
                "title": title,
                "x": "rank",
                "unit": "%" if series is kept else "",
                "note": f"{note} Line: mean over the layers; range: worst to best layer.",
                "series": series,
            }


def spectrum_tables(content: Content) -> Iterator[str]:
    headers = ("rank", "variance, mean", "smallest", "layer of the smallest")
    for name, analysis in content.squeeze.items():
        rows = [
            (
                f"{rank} (recommended)" if rank == analysis["recommended_rank"] else rank,
                f"{analysis['mean_variance'][str(rank)]:.4%}",
                f"{analysis['min_variance'][str(rank)]:.4%}",
                analysis["worst_layer"][str(rank)],
            )
            for rank in analysis["ranks"]
        ]
        yield table(f"Ranks of the adapter of {name}", headers, rows)


def _filled(values: list[float], rank: int, beyond: float) -> np.ndarray:
    """float64 [rank]: a layer of a lower rank has nothing left beyond it."""
    return np.array([*values, *[beyond] * (rank - len(values))])


def _over_layers(curves: list[np.ndarray]) -> dict[str, Any]:
    values = np.stack(curves)
    return {
        "x": list(range(1, values.shape[1] + 1)),
        "y": numbers(values.mean(axis=0)),
        "lo": numbers(values.min(axis=0)),
        "hi": numbers(values.max(axis=0)),
    }
