"""Where the batch-size controller ends on this machine, beside a sweep of fixed batch sizes.

    OMP_NUM_THREADS=1 python benchmarks/backpressure_real.py

First a run with `[backpressure]`, then the sizes 1, 2, 4, ... and the one it ended at in turns, a training step each.
The learning rate is 0 and every group is trained on, so that all steps do the same work for a token. Exit status 0
only where the controller's size gives at least 0.9 of the best size's tokens per second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rounds import in_rounds, write

from retrain.backpressure.controller import warmup_sizes
from retrain.config.build import build
from retrain.training.interrupt import Interrupts
from retrain.training.loop import Run, run_steps
from retrain.training.records import rows
from retrain.training.run import LogObserver, open_run

TARGET = 0.9


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as opened:
        adaptive = open_at(args, Path(scratch, "adaptive"), opened, enabled=True)
        run_steps(adaptive)
        assert adaptive.backpressure is not None
        end = adaptive.backpressure.batch_size
        law = list(rows(Path(scratch, "adaptive", "metrics.jsonl")))[-1]
        fixed = open_at(args, Path(scratch, "fixed"), opened, enabled=False)
        sizes = sorted({*warmup_sizes(adaptive.config.backpressure), end})
        speeds = in_rounds({str(size): stepper(fixed, size) for size in sizes}, args.rounds)
    middle = {size: median(speeds[str(size)]) for size in sizes}
    best = max(middle, key=lambda size: middle[size])
    print(
        f"{args.model}, {args.group} completions a prompt, {torch.get_num_threads()} thread(s), {args.rounds} rounds\n"
    )
    print("| batch_size | tokens/s | share of the best |\n|---|---|---|")
    for size in sizes:
        mark = " (where the controller ended)" if size == end else ""
        print(f"| {size}{mark} | {middle[size]:.0f} | {middle[size] / middle[best]:.2f} |")
    fit = ", ".join(f"{key} {law[f'bp_{key}']:.3g}" for key in ("scale", "sigma", "kappa"))
    print(f"\nafter {args.steps} steps: {fit}, p* {law['bp_p_star'] and round(law['bp_p_star'])}")
    write(args.json, {"end": end, "best": best, "tokens_per_s": middle})
    return 0 if middle[end] >= TARGET * middle[best] else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--data", default="arithmetic")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--most", type=int, default=64, help="backpressure.max_batch_size")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="of the run with backpressure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="PATH", help="write the record here")
    return parser.parse_args(argv)


def open_at(args: argparse.Namespace, log_dir: Path, opened: ExitStack, *, enabled: bool) -> Run:
    overrides: dict[str, Any] = {
        "model.model": args.model,
        "backend.devices": args.device,
        "data.source": args.data,
        "algorithm.advantage_mode": "grpo",
        "algorithm.transform_mode": "none",
        "algorithm.skip_uniform_groups": False,
        "training.seed": 1,
        "training.group_size": args.group,
        "training.batch_size": min(8, args.most),
        "training.max_tokens": args.max_tokens,
        "training.max_steps": args.steps,
        "training.temperature": 1.0,
        "training.lr": 0.0,
        "training.gradient_checkpointing": False,
        "training.save_every": 10**6,
        "backpressure.enabled": enabled,
        "backpressure.max_batch_size": args.most,
        "logging.log_dir": str(log_dir),
    }
    return open_run(build({}, overrides=overrides), None, Interrupts(), LogObserver(), opened)


def stepper(run: Run, size: int) -> Callable[[], int]:
    """One training step of `size` prompts; returns the tokens that it sampled."""

    def step() -> int:
        update = {"batch_size": size, "max_steps": run.state.step + 1}
        training = run.config.training.model_copy(update=update)
        run.config = run.config.model_copy(update={"training": training})
        before = run.state.completion_tokens
        run_steps(run)
        return run.state.completion_tokens - before

    return step


if __name__ == "__main__":
    sys.exit(main())
