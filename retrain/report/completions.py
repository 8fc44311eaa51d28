"""The sampled completions that a reader can browse, token by token, within a budget of bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrain.report.gather import Content, RunPart

# Of the page, as JSON.
MOST_BYTES = 4_000_000
# Of a prompt: its end, which is nearest to the completion.
MOST_PROMPT = 2000


def completions(content: Content) -> tuple[list[dict[str, Any]], int]:
    """The completions in the order of runs and steps, and how many of those that were read are left out.

    Where not all fit, every step keeps its first ones, which are the most telling.
    """
    rows = [(run, row) for run in content.runs for row in run.records.credit]
    ranks: dict[tuple[str, int], int] = {}
    ranked = []
    for place, (run, row) in enumerate(rows):
        rank = ranks[run.label, row["step"]] = ranks.get((run.label, row["step"]), -1) + 1
        ranked.append((rank, place))
    kept: dict[int, dict[str, Any]] = {}
    left = MOST_BYTES
    for _, place in sorted(ranked):
        shown = _shown(*rows[place])
        left -= len(json.dumps(shown))
        if left < 0:
            break
        kept[place] = shown
    return [kept[place] for place in sorted(kept)], len(rows) - len(kept)


def _shown(run: RunPart, row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"]
    return {
        "run": run.label,
        "step": row["step"],
        "prompt": prompt if len(prompt) <= MOST_PROMPT else "... " + prompt[-MOST_PROMPT:],
        "reference": row["reference"][:MOST_PROMPT],
        "reward": row["reward"],
        "advantage": row["advantage"],
        "finish": row["finish_reason"],
        "lambda": row["sepa_lambda"] if run.pools else None,
        "tokens": row["tokens"],
        "advantages": row["advantages"],
        "uncertainty": row["uncertainty"],
        "planning": row["planning"],
        "cut": row["cut"],
    }
