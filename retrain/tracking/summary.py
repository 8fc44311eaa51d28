"""What a run says at its end: what was learned, where it lies, how to use it and how to go on. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrain.assets import resolve_model
from retrain.tracking.console import clock, percent
from retrain.training.folder import CONFIG, FINAL, METRICS
from retrain.training.metrics import RUNNING_STEPS
from retrain.training.records import rows

if TYPE_CHECKING:
    from retrain.config import Config


def closing_summary(config: Config, log_dir: Path) -> list[str]:
    """Lines for a person. Empty rates are shown as "-"."""
    metrics = list(rows(log_dir / METRICS))
    if not metrics:
        return []
    first, last = metrics[:RUNNING_STEPS], metrics[-RUNNING_STEPS:]
    seconds = sum(row["step_time_s"] for row in metrics)
    tokens = sum(row["completion_tokens"] for row in metrics)
    final = log_dir / FINAL
    return [
        "",
        f"correct rate: {percent(_mean(first))} in the first {len(first)} steps, "
        f"{percent(_mean(last))} in the last {len(last)}",
        f"{len(metrics)} steps, {tokens} sampled tokens in {clock(seconds)}",
        f"adapter:  {final}",
        f'use it:   PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{resolve_model(config.model.model)}"), '
        f'"{final}")',
        f"go on:    retrain {log_dir / CONFIG} --resume {log_dir} --max-steps {2 * config.training.max_steps}",
        f"records:  {log_dir / METRICS} and generations.jsonl; `retrain status {log_dir}`",
    ]


def _mean(metrics: Iterable[dict[str, Any]]) -> float | None:
    rates = [row["correct_rate"] for row in metrics if row["correct_rate"] is not None]
    return sum(rates) / len(rates) if rates else None
