"""`python -m scripts.torture`: kills, damages and starves the real command; exit status 1 where a promise is broken."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path

# Before torch is imported, here or in a process of its own.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

from retrain.config import KEYS
from scripts.torture import damage, kills, surroundings
from scripts.torture.bench import Bench, OutOfTime
from scripts.torture.command import fresh


def main() -> int:
    asked = arguments()
    root = asked.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    root.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    bench = Bench(root, asked.seed, began + asked.budget)
    out_of_time = False
    try:
        undisturbed(bench)
        (quick if asked.quick else everything)(bench, asked.runs)
    except OutOfTime:
        out_of_time = True
    result = {
        "seed": asked.seed,
        "seconds": round(time.monotonic() - began, 1),
        "write_points": len(bench.points),
        "kills": bench.run.killed,
        "out_of_time": out_of_time,
        "tried": dict(bench.tried),
        "skipped": bench.skipped,
        "wrong": bench.wrong,
    }
    print(table(result))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not bench.wrong:
        shutil.rmtree(root)
    return 1 if bench.wrong else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the random moments and damages (default: 1)")
    parser.add_argument("--runs", type=int, default=100, help="runs that are killed at random moments (default: 100)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="no new trial after that")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there as well")
    parser.add_argument("--quick", action="store_true", help="a sample of everything, under a minute")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder); kept where it failed")
    return parser.parse_args()


def undisturbed(bench: Bench) -> None:
    """The run that all others are compared with, and twice the same in forks: forking makes no difference."""
    import retrain.tracking.console
    import retrain.training.run  # noqa: F401
    from retrain.cli import main as command

    bench.fresh_seconds = _children(lambda: fresh(bench.config).expect(0))
    bench.log_dir.rename(bench.whole)
    with bench.trial("undisturbed, in this process"):
        # Everything that a run imports is imported now: the forks need not.
        sys.stdout.flush()
        command([str(bench.config)])
        bench.same_as_whole()
    with bench.trial("undisturbed, in a fork, changes counted"):
        found = []
        bench.cpu_seconds = _children(lambda: found.append(bench.run(bench.config, watch=bench.log_dir).expect(0)))
        bench.points = found[0].points
        bench.same_as_whole()


def _children(work: Callable[[], object]) -> float:
    """Seconds of the processor that the children of this process spend in it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def everything(bench: Bench, runs: int) -> None:
    points = range(len(bench.points))
    files = damage.files_of(bench.whole)
    around(bench, bench.random.sample(points, 5), list(KEYS))
    trials = [partial(kills.at_write_points, bench, "before", [at]) for at in points]
    trials += [partial(kills.at_write_points, bench, "torn", [at]) for at in points if _is_write(bench.points[at])]
    trials += [partial(kills.at_write_points, bench, "power", [at]) for at in points]
    back, fork = kills.points_of_both(bench)
    trials += [partial(kills.while_going_back, bench, [at]) for at in range(back)]
    trials += [partial(kills.while_forking, bench, [at]) for at in range(fork)]
    trials += [partial(kills.at_random_moments, bench, 1)] * runs
    trials += [
        partial(kills.stopped, bench, number) for number in islice(cycle((signal.SIGINT, signal.SIGTERM)), runs // 5)
    ]
    trials += [partial(kills.in_fresh_processes, bench, 1)] * (runs // 20)
    trials += [partial(damage.every_file, bench, [case]) for case in product(files, damage.MANNERS)]
    trials += [partial(damage.every_file, bench, [(name, "bit flipped")]) for name in files] * 4
    trials += [partial(surroundings.full_disk, bench, [size]) for size in range(64, 1600, 64)]
    # Mixed: where the time does not suffice for all, what was done is a sample of everything.
    bench.random.shuffle(trials)
    for each in trials:
        each()


def _is_write(point: str) -> bool:
    return point.startswith("write ")


def quick(bench: Bench, runs: int) -> None:
    """Every kind of trial, with a handful of each; another seed takes others."""
    points = range(len(bench.points))
    some = bench.random.sample(points, 5)
    kills.at_write_points(bench, "before", some[:2])
    kills.at_write_points(bench, "power", some[2:4])
    kills.while_going_back(bench, [bench.random.randrange(10, 30)])
    kills.at_random_moments(bench, 1)
    kills.stopped(bench, bench.random.choice((signal.SIGINT, signal.SIGTERM)))
    names = damage.files_of(bench.whole)
    kinds = [bench.random.choice(list(damage.MANNERS)) for _ in names]
    damage.every_file(bench, zip(names, kinds, strict=True))
    around(bench, some[4:], bench.random.sample(list(KEYS), 12))


def around(bench: Bench, points: Sequence[int], keys: Sequence[str]) -> None:
    surroundings.read_only(bench)
    surroundings.two_processes(bench)
    surroundings.clock(bench, points)
    surroundings.changed_config(bench, keys)
    surroundings.more_steps(bench)
    surroundings.finished(bench)
    surroundings.fork(bench)
    surroundings.refusals(bench)


def table(result: dict) -> str:
    tried, wrong = result["tried"], result["wrong"]
    width = max(map(len, tried))
    rows = [f"{name:<{width}}  {count:>6}  {len(wrong.get(name, ())) or '-':>5}" for name, count in tried.items()]
    rows += [f"{name:<{width}}  skipped: {why}" for name, why in result["skipped"].items()]
    rows += [f"{'SIGKILLs, of the forks':<{width}}  {result['kills']:>6}"]
    details = [f"\nWRONG: {name}: {each}" for name, found in wrong.items() for each in found]
    return "\n".join([f"{'':<{width}}  {'trials':>6}  {'wrong':>5}", *rows, *details])


if __name__ == "__main__":
    sys.exit(main())
