"""An analysis for a person: a table of the ranks, and one of the layers with a small picture of each spectrum."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrain.squeeze.analysis import Analysis, LayerSpectrum
from retrain.squeeze.compression import Compression

BARS = " ▁▂▃▄▅▆▇█"
ASCII_BARS = " .:-=+*#@"
PICTURE_WIDTH = 24


def show_analysis(analysis: Analysis, console: Console) -> None:
    """Print it; the layers worst first, at the recommended rank or the largest candidate that takes something away."""
    target = analysis.min_variance_retention
    console.print(
        f"{analysis.adapter}: {len(analysis.layers)} layers, rank {analysis.source_rank}", markup=False, soft_wrap=True
    )
    console.print(_ranks(analysis))
    rank = analysis.recommended_rank
    if rank is None:
        console.print(f"No candidate keeps {target:.1%} of the variance on average.")
    else:
        console.print(f"Recommended: rank {rank}, the smallest that keeps {target:.1%} on average over the layers.")
    # At the source rank every layer keeps all of it, which says nothing.
    smaller = [k for k in analysis.ranks if k < analysis.source_rank and k <= (rank or analysis.source_rank)]
    console.print(_layers(analysis, max(smaller, default=analysis.source_rank), _bars(console)))


def _bars(console: Console) -> str:
    return ASCII_BARS if console.options.ascii_only else BARS


def _ranks(analysis: Analysis) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("rank", "mean kept", "min kept", "parameters"):
        table.add_column(title, justify="right")
    table.add_column("worst layer", overflow="fold")
    for rank in analysis.ranks:
        table.add_row(
            f"{rank}",
            f"{analysis.mean_variance[rank]:.2%}",
            f"{analysis.min_variance[rank]:.2%}",
            f"{analysis.parameters[rank]:,}",
            Text(analysis.worst_layer[rank]),
            style="bold green" if rank == analysis.recommended_rank else "",
        )
    return table


def _layers(analysis: Analysis, rank: int, bars: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for title in ("rank", f"kept at {rank}", f"for {analysis.min_variance_retention:.0%}", "largest"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("spectrum", no_wrap=True)
    for layer in sorted(analysis.layers, key=lambda layer: layer.kept(rank)):
        table.add_row(
            Text(layer.name),
            f"{layer.rank}",
            f"{layer.kept(rank):.2%}",
            f"{layer.rank_for(analysis.min_variance_retention)}",
            f"{layer.singular_values[0]:.3g}",
            Text(picture(layer, bars)),
        )
    return table


def picture(layer: LayerSpectrum, bars: str = BARS) -> str:
    """The singular values from the largest to the smallest, as bars: each the mean of its share of them."""
    values, width = layer.singular_values, min(PICTURE_WIDTH, layer.rank)
    top = values[0] or 1.0
    edges = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    # A value that is not zero shows.
    return "".join(bars[max(round(mean / top * (len(bars) - 1)), 1 if mean > 0 else 0)] for mean in means)


def show_compression(done: Compression, console: Console) -> None:
    ranks = sorted(set(done.ranks.values()))
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    lines = (
        f"Squeezed to {shown}: keeps {done.mean_variance:.2%} of the variance on average, {done.min_variance:.2%} in "
        f"the worst layer ({done.worst_layer})",
        f"{done.parameters:,} parameters, {done.parameters / done.source_parameters:.1%} of {done.source_parameters:,}",
        *_evaluation(done.evaluation),
        *([f"Written to {done.output}"] if done.output else []),
    )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _evaluation(found: dict[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    difference = found["difference"]
    yield (
        f"Reward on {found['examples']} held-out examples x {found['samples']}: {found['before']:.3f} before, "
        f"{found['after']:.3f} after; difference {difference['value']:+.3f} "
        f"(95% {difference['low']:+.3f} to {difference['high']:+.3f})"
    )
    if found["errors"]:
        yield f"{found['errors']} completions could not be scored and are left out"
