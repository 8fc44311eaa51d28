"""`python scripts/soak.py`: thousands of steps in one process; memory, open files and the time of a step stay flat.

Exit status 1 where one of them grows. The run is as small as it gets, so that what leaks is not hidden in what is used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np

# Of the first steps, while caches fill: not counted.
WARM_UP = 0.1
# In windows of so many, of which the medians count.
WINDOWS = 20
# What may be seen over the whole run without anything growing: allocators round, and machines are busy at times.
MOST_BYTES = 8 << 20
MOST_SLOWER = 1.25

CONFIG = {
    "backend.devices": "cpu",
    "model.model": "builtin:tiny",
    "model.lora_rank": 2,
    "algorithm.transform_mode": "gtpo_sepa",
    "training.seed": 1,
    "training.batch_size": 2,
    "training.group_size": 4,
    "training.max_tokens": 12,
    "training.lr": 1e-7,  # a policy that stays as it is: what changes is not the work
    "training.save_every": 50,
    "training.gradient_checkpointing": False,
    "eval.every": 100,
    "eval.examples": 4,
    "data.source": "arithmetic",
    "data.eval_fraction": 0.1,
    "training.max_examples": 200,
}


@dataclass
class Meter:
    """Observes a run: after every step, bytes of memory, open files, and seconds of the processor since the last."""

    rows: list[tuple[int, int, float]] = field(default_factory=list)
    _last: float = field(default_factory=time.process_time)

    def say(self, line: str) -> None:
        print(line, flush=True)

    def on_step(self, metrics: dict[str, Any], generations: list[dict[str, Any]]) -> None:
        now = time.process_time()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(list(Path("/proc/self/fd").iterdir()))
        self.rows.append((pages * os.sysconf("SC_PAGE_SIZE"), files, now - self._last))
        self._last = now
        if metrics["step"] % 200 == 0:
            print(f"step {metrics['step']}: {self.rows[-1][0] / 1e6:.1f} MB, {files} open files", flush=True)


def figures(rows: list[tuple[int, int, float]]) -> dict[str, Any]:
    """Growth over the run: of memory by a line through medians, of open files, of a step's time by its quickest."""
    kept = rows[int(len(rows) * WARM_UP) :]
    windows = [window for window in np.array_split(np.array(kept), WINDOWS) if len(window)]
    memory = [median(window[:, 0]) for window in windows]
    # Not the median: other processes slow steps down, nothing speeds them up.
    times = [float(np.percentile(window[:, 2], 10)) for window in windows]
    per_window = float(np.polyfit(range(len(memory)), memory, 1)[0])
    third = max(1, len(times) // 3)
    return {
        "steps": len(rows),
        "rss_bytes": int(memory[-1]),
        "rss_growth_bytes": int(per_window * (len(memory) - 1)),
        "rss_slope_bytes_per_step": round(per_window * len(windows) / len(kept), 1),
        "open_files_first": int(kept[0][1]),
        "open_files_last": int(kept[-1][1]),
        "step_cpu_seconds": round(median(times), 5),
        "step_time_ratio": round(median(times[-third:]) / median(times[:third]), 3),
    }


def complaints(found: dict[str, Any]) -> list[str]:
    wrong = []
    if found["rss_growth_bytes"] > MOST_BYTES:
        wrong.append(f"memory grew by {found['rss_growth_bytes'] / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.1f}")
    if found["open_files_last"] > found["open_files_first"]:
        wrong.append(f"open files grew from {found['open_files_first']} to {found['open_files_last']}")
    if found["step_time_ratio"] > MOST_SLOWER:
        wrong.append(f"a step takes {found['step_time_ratio']} times what it took at first, more than {MOST_SLOWER}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    asked = parser.parse_args()
    from retrain.config.build import build
    from retrain.training.run import train

    meter = Meter()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        log_dir = f"{folder}/run"
        train(build({}, {**CONFIG, "training.max_steps": asked.steps, "logging.log_dir": log_dir}), observer=meter)
    found = figures(meter.rows)
    print(json.dumps(found, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for line in complaints(found):
        print(f"WRONG: {line}")
    return 1 if complaints(found) else 0


if __name__ == "__main__":
    sys.exit(main())
