"""The tables of the page, as HTML: everything in them is escaped here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from retrain.tracking.console import compared, interval, number, percent

if TYPE_CHECKING:
    from retrain.report.gather import Content


def table(caption: str, headers: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """left: so many columns from the left hold words, the others numbers."""
    head = "".join(f'<th scope="col"{_side(i, left)}>{escape(str(name))}</th>' for i, name in enumerate(headers))
    body = "".join(
        "<tr>"
        + f'<th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td{_side(i, left)}>{escape(str(cell))}</td>" for i, cell in enumerate(row[1:], start=1))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _side(column: int, left: int) -> str:
    return ' class="n"' if column >= left else ""


def runs_table(content: Content) -> str:
    rows = [
        (
            run.label,
            run.group,
            run.facts["model"],
            run.facts["state"],
            "-" if run.seed < 0 else run.seed,
            f"{run.facts['step']}/{run.facts['max_steps']}",
            percent(run.records.last.get("running_correct_rate")),
            number(run.records.last.get("step_time_s")),
        )
        for run in content.runs
    ]
    headers = ("run", "condition", "model", "state", "seed", "step", "correct, last 10 steps", "s/step")
    return table("Runs", headers, rows, left=4)


def warnings_table(content: Content) -> str:
    """What the runs warned of; "" where they did not."""
    rows = [
        (run.label, name, seen.count, seen.first, seen.last)
        for run in content.runs
        for name, seen in run.records.warnings.items()
    ]
    if not rows:
        return ""
    return table("Warnings", ("run", "warning", "steps", "first", "last"), rows, left=2)


def results_tables(results: dict[str, Any]) -> Iterator[str]:
    """A table for each measure of results.json, and what one must know to read it."""
    confidence = f"{results['confidence']:.0%} interval"
    against = f"against {results['baseline']}"
    headers = (
        "condition",
        "seeds",
        "mean",
        confidence,
        against,
        confidence,
        "p",
        "p (flips)",
        "seeds needed",
        "verdict",
    )
    for measure in results["measures"].values():
        rows = []
        for name, own in measure["conditions"].items():
            other = measure["comparisons"].get(name)
            baseline = ["baseline" if name == results["baseline"] else "-", "", "", "", "", ""]
            cells = compared(other) if other is not None else baseline
            rows.append([name, own["n"], percent(own["mean"]), interval(own, percent), *cells])
        yield table(measure["title"], headers, rows)
    yield f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in results['remarks'])}</ul>"
