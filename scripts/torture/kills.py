"""Killed at every write point and at random moments, a run that goes on is the run that was left alone."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterable

from scripts.torture.bench import Bench
from scripts.torture.command import KILLED, fresh, fresh_killed
from scripts.torture.faults import Death

MANNERS = {"before": {}, "torn": {"torn": True}, "power": {"power": True}}
INTERRUPTED = 130


def at_write_points(bench: Bench, manner: str, points: Iterable[int]) -> None:
    """Killed just before each of these changes, or in the middle of it; or with the power cut."""
    for at in points:
        with bench.trial(f"killed at a write point, {manner}", f"{at} {bench.points[at]}"):
            bench.run(bench.config, watch=bench.log_dir, death=Death(at, **MANNERS[manner])).expect(KILLED)
            bench.again().expect(0)
            bench.same_as_whole()


def at_random_moments(bench: Bench, runs: int, *, most: int = 4) -> None:
    """Killed after a random share of the processor's time of a whole run, up to `most` times until it is through."""
    for _ in range(runs):
        with bench.trial("killed at random moments, again and again"):
            for _ in range(most):
                done = bench.again(cpu_seconds=bench.random.uniform(0, bench.cpu_seconds))
                if done.status != KILLED:
                    break
                bench.tried["  kills of these"] += 1
            bench.again().expect(0)
            bench.same_as_whole()


def stopped(bench: Bench, number: signal.Signals) -> None:
    """SIGINT or SIGTERM at a random moment. Before the run listens to them they just end the process."""
    with bench.trial("stopped by SIGINT or SIGTERM at a random moment", number.name):
        moment = bench.random.uniform(0, bench.cpu_seconds)
        done = bench.run(bench.config, cpu_seconds=moment, number=number)
        if done.status not in (0, -number):
            done.expect(INTERRUPTED)
        if done.status:
            bench.again().expect(0)
        # It wrote a checkpoint where it stopped, which has taken the place of an older one.
        bench.same_as_whole(but=bench.older_checkpoints())


def in_fresh_processes(bench: Bench, runs: int) -> None:
    """As a user would: interpreters of their own, killed at random moments, loading included."""
    for _ in range(runs):
        with bench.trial("killed at a random moment, real process"):
            fresh_killed(bench.random.uniform(0, bench.fresh_seconds), bench.config)
            again = fresh(bench.config)
            (fresh(*again.advice) if again.status == 2 else again).expect(0)
            bench.same_as_whole()


def while_going_back(bench: Bench, points: Iterable[int]) -> None:
    """A finished run goes back to an earlier checkpoint of its own, and is killed on the way."""
    for at in points:
        with bench.trial("killed while going back to an earlier checkpoint", str(at), begun=True):
            bench.run(*_back(bench), watch=bench.log_dir, death=Death(at, power=at % 2 == 1)).expect(KILLED)
            bench.run(bench.log_dir / "config.toml", "--resume", bench.log_dir).expect(0)
            bench.same_as_whole()


def while_forking(bench: Bench, points: Iterable[int]) -> None:
    """A fork into another folder is killed; the same command begins it again, or says how to go on."""
    for at in points:
        shutil.rmtree(bench.root / "fork", ignore_errors=True)
        with bench.trial("killed while forking into another folder", str(at)):
            bench.run(*_fork(bench), watch=bench.root / "fork", death=Death(at, power=at % 2 == 1)).expect(KILLED)
            bench.again(*_fork(bench)).expect(0)
            bench.same_as_whole(bench.root / "fork")


def points_of_both(bench: Bench) -> tuple[int, int]:
    """How many changes going back makes, and how many a fork."""
    shutil.rmtree(bench.root / "fork", ignore_errors=True)
    with bench.trial("going back and forking, changes counted", begun=True):
        back = bench.run(*_back(bench), watch=bench.log_dir).expect(0)
        bench.same_as_whole()
        fork = bench.run(*_fork(bench), watch=bench.root / "fork").expect(0)
        bench.same_as_whole(bench.root / "fork")
        return len(back.points), len(fork.points)
    return 0, 0


def _back(bench: Bench) -> tuple[object, ...]:
    return bench.log_dir / "config.toml", "--resume", bench.log_dir / "checkpoints" / "step_000004"


def _fork(bench: Bench) -> tuple[object, ...]:
    return bench.config, "--resume", bench.whole / "checkpoints" / "step_000004", "--log-dir", bench.root / "fork"
