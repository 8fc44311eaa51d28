"""A campaign's results as text: tables, and what they cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from retrain.campaign.results import CANNOT_TELL
from retrain.tracking.console import percent


def tables(results: dict[str, Any]) -> Iterator[RenderableType]:
    """One table a measure, then the lines of `remarks`."""
    for measure in results["measures"].values():
        yield Text()
        yield Text(f"{measure['title']}; {results['confidence']:.0%} intervals over seeds", style="bold")
        yield _table(results, measure)
    yield Text()
    for line in remarks(results):
        yield Text(line)


def _table(results: dict[str, Any], measure: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    against = f"against {results['baseline']}"
    headers = ("condition", "seeds", "mean", "interval", against, "interval", "p", "p (flips)", "seeds needed", "")
    for i, name in enumerate(headers):
        table.add_column(name, justify="right" if 0 < i < 9 else "left", no_wrap=i == 0)
    for name, own in measure["conditions"].items():
        cells = [name, str(own["n"]), percent(own["mean"]), _interval(own)]
        other = measure["comparisons"].get(name)
        if other is not None:
            cells += [
                _points(other["mean"]),
                _interval(other, points=True),
                _p(other["p_t_holm"]),
                _p(other["p_flip_holm"]),
                "-" if other["seeds_needed"] is None else f"{other['seeds_needed']:,}",
                other["verdict"],
            ]
        table.add_row(*map(Text, cells))
    return table


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


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _interval(estimate: dict[str, Any], *, points: bool = False) -> str:
    if estimate["low"] is None:
        return "-"
    show = _points if points else percent
    return f"{show(estimate['low'])} to {show(estimate['high'])}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
