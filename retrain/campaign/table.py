"""A campaign's results as text: tables, and what they cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from retrain.tracking.console import compared, interval, percent


def tables(results: dict[str, Any]) -> Iterator[RenderableType]:
    """One table a measure, then the remarks."""
    for measure in results["measures"].values():
        yield Text()
        yield Text(f"{measure['title']}; {results['confidence']:.0%} intervals over seeds", style="bold")
        yield _table(results, measure)
    yield Text()
    for line in results["remarks"]:
        yield Text(line)


def _table(results: dict[str, Any], measure: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    against = f"against {results['baseline']}"
    headers = ("condition", "seeds", "mean", "interval", against, "interval", "p", "p (flips)", "seeds needed", "")
    for i, name in enumerate(headers):
        table.add_column(name, justify="right" if 0 < i < 9 else "left", no_wrap=i == 0)
    for name, own in measure["conditions"].items():
        cells = [name, str(own["n"]), percent(own["mean"]), interval(own, percent)]
        other = measure["comparisons"].get(name)
        if other is not None:
            cells += compared(other)
        table.add_row(*map(Text, cells))
    return table
