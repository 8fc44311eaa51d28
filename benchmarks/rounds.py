"""What the benchmarks share: interleaved rounds, ratios within a round, a table and a record."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch


def clock() -> float:
    """Seconds. The process's own with one CPU thread, so that what else runs on the machine counts little."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def in_rounds(contenders: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each contender, round by round, after one call of each that does not count.

    A contender returns the number of tokens that it made. A round runs everybody once: drift hits all alike.
    """
    for run in contenders.values():
        run()
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = clock()
            tokens = run()
            speeds[name].append(tokens / (clock() - start))
    return speeds


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def record(**figures: Any) -> dict[str, Any]:
    """The figures with what they were measured on."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        **figures,
    }


def write(path: str | None, figures: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(record(**figures), indent=2) + "\n", encoding="utf-8")
