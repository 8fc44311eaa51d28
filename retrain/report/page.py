"""The page itself: markup around the tables, the data of charts and completions, style and script, all inline."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from retrain.report.capacity import capacity_charts
from retrain.report.charts import MOST_GROUPS, charts_over_steps, histograms
from retrain.report.completions import completions
from retrain.report.spectra import spectra, spectrum_tables
from retrain.report.tables import results_tables, runs_table, warnings_table

if TYPE_CHECKING:
    from retrain.report.gather import Content

MOST_BYTES = 16_000_000

SECTIONS = {
    "learning": "Learning",
    "credit": "Credit",
    "distributions": "Rewards and lengths",
    "training": "Training",
    "speed": "Speed",
    "squeeze": "Rank of the adapter",
}


def render(content: Content) -> str:
    """The page as one string of HTML."""
    style, script = (files("retrain.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    charts = [*charts_over_steps(content), *histograms(content), *capacity_charts(content), *spectra(content)]
    samples, left_out = completions(content)
    title = _title(content)
    body = "".join(
        [
            _header(content, title),
            *_notes(content),
            *(_section("results", "Results", *results_tables(content.results)) if content.results else ()),
            _charts_of("learning", charts),
            _browser(samples, left_out),
            *(_charts_of(section, charts) for section in ("credit", "distributions", "training", "speed")),
            _charts_of("squeeze", charts, *spectrum_tables(content)),
            *_section("runs", "Runs", runs_table(content)),
            "</main>",
        ]
    )
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{_data({"charts": charts, "completions": samples})}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _title(content: Content) -> str:
    name = content.folder.resolve().name
    kind = "Campaign" if content.manifest else "Run" if len(content.runs) == 1 else "Runs"
    return f"{kind} {name}"


def _header(content: Content, title: str) -> str:
    runs = content.runs
    models = ", ".join(sorted({run.facts["model"] for run in runs}))
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.facts["state"]] = counts.get(run.facts["state"], 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    groups = f"{len(content.groups)} conditions, " if len(content.groups) > 1 else f"{runs[0].group}, "
    return (
        '<a class="skip" href="#main">Skip to the content</a>'
        f"<header><div><h1>{escape(title)}</h1><p>{escape(models)}: "
        f"{escape(groups)}{len(runs)} run{'s' if len(runs) > 1 else ''} ({escape(states)}), "
        f"{content.last_step:,} steps</p></div>"
        '<button type="button" id="theme">Dark</button></header><main id="main">'
        "<noscript><p>The charts and the completions are drawn by the script in this page, which is switched off."
        "</p></noscript>"
    )


def _notes(content: Content) -> Iterator[str]:
    """What went wrong, first: in the runs, and in reading them."""
    warned = warnings_table(content)
    if warned:
        yield from _section("warnings", "Warnings", warned)
    notes = list(content.problems)
    if len(content.groups) > MOST_GROUPS:
        notes.append(f"The charts show the first {MOST_GROUPS} of {len(content.groups)} conditions.")
    if notes:
        yield f'<ul class="problems">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>'


def _section(name: str, title: str, *parts: str) -> Iterator[str]:
    yield f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def _charts_of(section: str, charts: list[dict[str, Any]], *tables: str) -> str:
    figures = "".join(
        f'<figure data-chart="{i}"><figcaption><h3>{escape(chart["title"])}</h3><p>{escape(chart["note"])}</p>'
        "</figcaption></figure>"
        for i, chart in enumerate(charts)
        if chart["section"] == section
    )
    grid = f'<div class="grid">{figures}</div>'
    return "".join(_section(section, SECTIONS[section], grid, *tables)) if figures else ""


def _browser(samples: list[dict[str, Any]], left_out: int) -> str:
    """The frame of the completions' browser, which the script fills."""
    if not samples:
        what = "<p>No run recorded the credit of its tokens: [logging] credit_samples is 0, or no step trained.</p>"
        return "".join(_section("completions", "Where the credit went", what))
    left = f" {left_out} more do not fit on this page." if left_out else ""
    frame = (
        "<p>Sampled completions. Each token is shaded by its advantage (blue: made likelier, orange: less likely) or "
        f"by its uncertainty; planning tokens are underlined, what an environment wrote is grey.{left}</p>"
        '<div class="controls"><label>Run <select id="run"></select></label>'
        '<label>Step <select id="step"></select></label>'
        '<button type="button" id="earlier">Earlier</button><button type="button" id="later">Later</button>'
        "<fieldset><legend>Shade by</legend>"
        '<label><input type="radio" name="shade" value="advantages" checked> advantage</label>'
        '<label><input type="radio" name="shade" value="uncertainty"> uncertainty</label></fieldset></div>'
        '<p id="scale"></p><div id="samples"></div>'
        '<p id="token" role="status">Point at a token, or move through a completion with the arrow keys.</p>'
    )
    return "".join(_section("completions", "Where the credit went", frame))


def _data(value: Any) -> str:
    """JSON that cannot end the script element it stands in, nor start a comment there."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
