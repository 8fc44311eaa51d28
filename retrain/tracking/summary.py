"""What a run says at its end: what was learned, where it lies, how to use it and how to go on. Torch-free."""

from __future__ import annotations

import shlex
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from retrain.assets import resolve_model
from retrain.tracking.console import clock, percent
from retrain.training.folder import CONFIG, FINAL, GENERATIONS, METRICS
from retrain.training.metrics import RUNNING_STEPS
from retrain.training.records import rows

if TYPE_CHECKING:
    from retrain.config import Config


def closing_summary(config: Config, log_dir: Path) -> list[str]:
    """Lines for a person; empty where no step was made. Rates that do not exist are shown as "-"."""
    first: list[float | None] = []
    last: deque[float | None] = deque(maxlen=RUNNING_STEPS)
    steps, tokens, seconds = 0, 0, 0.0
    for row in rows(log_dir / METRICS):
        if steps < RUNNING_STEPS:
            first.append(row["correct_rate"])
        last.append(row["correct_rate"])
        steps, tokens, seconds = steps + 1, tokens + row["completion_tokens"], seconds + row["step_time_s"]
    if not steps:
        return []
    base, final = resolve_model(config.model.model), log_dir / FINAL
    folder = shlex.quote(str(log_dir))
    return [
        "",
        f"correct rate: {percent(_mean(first))} in the first {len(first)} steps, "
        f"{percent(_mean(last))} in the last {len(last)}",
        f"{steps} steps, {tokens} sampled tokens in {clock(seconds)}",
        f"adapter:  {final}",
        f"use it:   PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(base)!r}), {str(final)!r})",
        f"go on:    retrain {shlex.quote(str(log_dir / CONFIG))} --resume {folder} "
        f"--max-steps {2 * config.training.max_steps}",
        f"records:  {log_dir / METRICS} and {GENERATIONS}; `retrain status {folder}`",
    ]


def _mean(rates: Iterable[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return sum(known) / len(known) if known else None
