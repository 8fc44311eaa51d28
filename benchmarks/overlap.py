"""What sampling ahead gains: step time with `max_staleness = 1` beside that of taking turns, on two devices.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py

Both runs sample in a process of its own (`devices = "cpu,cpu"`; on GPUs, --devices gpu:0,gpu:1). The batch size is
chosen so that sampling and training take about equal time, where the most can be gained: a step that overlaps them
takes the longer of the two, at best half of their sum. The learning rate is 0 and every group is trained on, so that
all steps do the same work. Blocks of steps in turns; the first step of a block does not count. Exit status 0 only where
the ratio meets the target and the two stages were within a quarter of each other.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rounds import ratio, write

from retrain.config.build import build
from retrain.training.interrupt import Interrupts
from retrain.training.loop import Run, run_steps
from retrain.training.records import rows
from retrain.training.run import LogObserver, open_run

TARGET = 0.65
EQUAL = 1.25
SIZES = (4, 6, 8, 12, 16, 24)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as opened:
        size = equal_size(open_at(args, Path(scratch, "trial"), opened, staleness=0))
        runs = {n: open_at(args, Path(scratch, str(n)), opened, staleness=n) for n in (0, 1)}
        seen: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
        for _ in range(args.rounds):
            for staleness, run in runs.items():
                seen[staleness].append(_middle(block(run, args.steps, size)))
    keys = ("sample_time_s", "train_time_s", "wait_time_s", "step_time_s")
    print(f"{args.model} on {args.devices}, {size} x {args.group} completions of at most {args.max_tokens} tokens,")
    print(f"{torch.get_num_threads()} thread(s), {args.rounds} rounds of {args.steps} steps; seconds\n")
    print("| max_staleness | sample | train | wait | step |\n|---|---|---|---|---|")
    for staleness, found in seen.items():
        print(f"| {staleness} | " + " | ".join(f"{median(row[key] for row in found):.2f}" for key in keys) + " |")
    share = ratio(*([row["step_time_s"] for row in seen[staleness]] for staleness in (1, 0)))
    stages = [median(row[key] for row in seen[0]) for key in keys[:2]]
    equal = max(stages) / min(stages)
    met = share <= TARGET and equal <= EQUAL
    verdict = "met" if met else "NOT MET"
    print(f"\na step that overlaps takes {share:.2f} of one that does not; target {TARGET:g}: {verdict}")
    write(args.json, {"settings": vars(args), "batch_size": size, "rounds": seen, "share": share, "met": met})
    return 0 if met else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--devices", default="cpu,cpu")
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6, help="of a block, the first of which does not count")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the figures there as well")
    return parser.parse_args(argv)


def open_at(args: argparse.Namespace, log_dir: Path, opened: ExitStack, *, staleness: int) -> Run:
    values = {
        "backend": {"devices": args.devices},
        "model": {"model": args.model, "lora_rank": 8},
        "algorithm": {"advantage_mode": "grpo", "skip_uniform_groups": False},
        "training": {
            "seed": 1,
            "max_steps": 10**6,
            "group_size": args.group,
            "max_tokens": args.max_tokens,
            "temperature": 1.0,
            "lr": 0.0,
            "save_every": 10**6,
            "max_staleness": staleness,
            "gradient_checkpointing": False,
        },
        # The slower way to decode: with the faster one they are equal only in steps so short that the rest of a step,
        # rewards and records, is a quarter of it.
        "inference": {"merged_copy": False},
        "data": {"source": "arithmetic"},
        "logging": {"log_dir": str(log_dir)},
    }
    return open_run(build(values), None, Interrupts(), LogObserver(), opened)


def equal_size(trial: Run) -> int:
    """The batch size at which sampling and training take most nearly the same time."""

    def imbalance(size: int) -> float:
        timed = _middle(block(trial, 4, size))
        return abs(math.log(timed["sample_time_s"] / timed["train_time_s"]))

    return min(SIZES, key=imbalance)


def block(run: Run, steps: int, batch_size: int) -> list[dict[str, Any]]:
    """Metrics of `steps` further steps, without the first."""
    update = {"max_steps": run.state.step + steps, "batch_size": batch_size}
    run.config = run.config.model_copy(update={"training": run.config.training.model_copy(update=update)})
    run_steps(run)
    return list(rows(run.folder.path / "metrics.jsonl"))[1 - steps :]


def _middle(timed: list[dict[str, Any]]) -> dict[str, float]:
    return {key: median(row[key] for row in timed) for key in timed[0] if key.endswith("_time_s")}


if __name__ == "__main__":
    sys.exit(main())
