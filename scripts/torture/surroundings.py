"""A full disk, a read-only folder, two processes, a clock that jumps, a config that has changed, and forks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from retrain.config import KEYS, Config, dump_toml, load_config, value_of
from retrain.training.checkpoint import TRAINER_STATE
from retrain.training.folder import CONFIG, METADATA
from retrain.training.start import CHANGEABLE, CHANGEABLE_SECTIONS, NOT_CHANGEABLE
from retrain.types import ConfigError
from scripts.torture.bench import Bench
from scripts.torture.command import KILLED, Wrong
from scripts.torture.compare import lines
from scripts.torture.faults import Death, jumping_clock


def full_disk(bench: Bench, kilobytes: Iterable[int]) -> None:
    """A real disk of that size fills up; with room, the run goes on by what it says."""
    for size in kilobytes:
        with mounted(bench, "-t", "tmpfs", "-o", f"size={size}k", "tmpfs") as disk:
            if disk is None:
                bench.skipped["full disk"] = "needs root and mount"
                return
            with bench.trial("full disk", f"{size}k"):
                done = bench.run(bench.config, "--log-dir", disk / "run")
                if done.status != 0:
                    done.expect(2 if "cannot be written to" in done.err else 1, "No space left")
                    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
                    bench.again(bench.config, "--log-dir", disk / "run").expect(0)
                bench.same_as_whole(disk / "run")


def read_only(bench: Bench) -> None:
    """A folder that takes no writes is refused by name; one with a finished run still says that it is finished."""
    with mounted(bench, "--bind", str(_new(bench.root / "locked"))) as place:
        if place is None:
            bench.skipped["read-only folder"] = "needs root and mount"
            return
        shutil.copytree(bench.whole, place / "run")
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        with bench.trial("read-only folder", "new run"):
            bench.run(bench.config, "--log-dir", place / "new").expect(2, "Read-only file system", "--log-dir")
        with bench.trial("read-only folder", "resumed with more steps"):
            words = (place / "run" / CONFIG, "--resume", place / "run", "--log-dir", place / "run")
            bench.run(*words, "--max-steps", 7).expect(2, "Read-only file system")
        with bench.trial("read-only folder", "finished run"):
            bench.run(*words).expect(0, "is finished")
            bench.same_as_whole(place / "run")


def two_processes(bench: Bench) -> None:
    """One writes; the other is refused by the process id of the first, whenever it comes, and harms nothing."""
    for name, words in (("anew", ()), ("resuming", ("--resume", bench.log_dir))):
        with bench.trial("two processes on one folder", name):
            first = bench.run.start([str(bench.config)])
            _wait((bench.log_dir / TRAINER_STATE).exists)
            second = bench.run(bench.config, *words)
            bench.run.finish(first, ()).expect(0)
            second.expect(2, f"in use by process {first}")
            bench.same_as_whole()
    with bench.trial("two processes on one folder", "at the same moment"):
        both = [bench.run.start([str(bench.config)]) for _ in range(2)]
        done = sorted((bench.run.finish(child, ()) for child in both), key=lambda outcome: outcome.status)
        done[0].expect(0)
        done[1].expect(2)
        bench.same_as_whole()
    with bench.trial("two processes on one folder", "the other ran while this one was loading"):
        late = bench.run.start([str(bench.config)], before=lambda: _hold_until(bench.root / "go"))
        bench.run(bench.config).expect(0)
        (bench.root / "go").touch()
        bench.run.finish(late, ()).expect(2, "already holds a run")
        bench.same_as_whole()
    with bench.trial("two processes on one folder", "the other went on with it while this one was loading"):
        (bench.root / "go").unlink()
        half = len(bench.points) // 2
        bench.run(bench.config, watch=bench.log_dir, death=Death(half)).expect(KILLED)
        words = (str(bench.config), "--resume", str(bench.log_dir))
        late = bench.run.start(words, before=lambda: _hold_until(bench.root / "go"))
        bench.run(*words).expect(0)
        (bench.root / "go").touch()
        bench.run.finish(late, words).expect(2, "another process went on")
        bench.same_as_whole()


def _hold_until(sign: Path) -> None:
    """Between finding that there is no run yet and taking the folder, wait for `sign`."""
    from retrain.training import run

    really = run.open_run

    def later(*arguments: Any) -> Any:
        _wait(sign.exists)
        return really(*arguments)

    run.open_run = later


def clock(bench: Bench, points: Iterable[int]) -> None:
    """The clock on the wall jumps by hours, days and years, in both directions, at every look at it."""
    with bench.trial("clock that jumps", "undisturbed otherwise"):
        bench.run(bench.config, before=jumping_clock).expect(0)
        bench.same_as_whole()
    for at in points:
        with bench.trial("clock that jumps", f"killed at {bench.points[at]}"):
            bench.run(bench.config, watch=bench.log_dir, death=Death(at), before=jumping_clock).expect(KILLED)
            for path in bench.log_dir.rglob("*"):
                moment = bench.random.uniform(0, 2 * time.time())
                os.utime(path, (moment, moment))
            bench.again(before=jumping_clock).expect(0)
            bench.same_as_whole()


def changed_config(bench: Bench, names: Iterable[str]) -> None:
    """Of these keys: one that may change is said, any other is refused by name, and nothing is written."""
    was, path = load_config(bench.whole / CONFIG), bench.root / "changed.toml"
    for name in names:
        changed, key = _with_another_value(bench.whole / CONFIG, name), KEYS[name]
        if changed is None or key.section == "campaign":  # that would be no run, but many
            continue
        allowed = name in CHANGEABLE or (key.section in CHANGEABLE_SECTIONS and name not in NOT_CHANGEABLE)
        with bench.trial("changed config, " + ("allowed" if allowed else "refused"), name, begun=True):
            path.write_text(dump_toml(changed), encoding="utf-8")
            done = bench.run(path, "--resume", bench.log_dir, before=_do_not_train)
            if allowed:
                done.expect(0, f"{name} {value_of(was, key)!r} -> {value_of(changed, key)!r}")
            elif "other values of" not in done.expect(2, name).err:
                raise Wrong(f"refused for another reason:\n{done.err}")
            bench.same_as_whole()


def _do_not_train() -> None:
    """What is said comes before anything is loaded; that is enough here."""
    from retrain.training import run

    run.open_run = lambda *_: sys.exit(0)


def _with_another_value(path: Path, name: str) -> Config | None:
    """The config with a value of the key that it does not have; None where none was found that this run could have."""
    key = KEYS[name]
    now = value_of(load_config(path), key)
    names = [each for facts in key.field.metadata for each in getattr(facts, "names", ())]
    guesses: list[Any] = [*get_args(key.field.annotation), *names, "other", ("other",)]
    if isinstance(now, bool):
        guesses = [not now]
    elif isinstance(now, int | float):
        guesses = [now + 1, now * 2, now / 2, now - 1]
    for guess in guesses:
        try:
            changed = load_config(path, {name: guess})
            if value_of(changed, key) != now and name not in ("resume.from", "logging.log_dir"):
                return changed
        except ConfigError:
            continue
    return None


def more_steps(bench: Bench) -> None:
    """Three steps and then three more are six, and an allowed key takes effect and is recorded."""
    constant = ("--lr-schedule", "constant")
    with bench.trial("resumed on more steps"):
        bench.run(bench.config, *constant).expect(0)
        six = bench.root / "six"
        bench.log_dir.rename(six)
        bench.run(bench.config, *constant, "--max-steps", 4).expect(0)
        done = bench.run(bench.log_dir / CONFIG, "--resume", bench.log_dir, "--max-steps", 6)
        done.expect(0, "training.max_steps 4 -> 6")
        changed = _sessions(bench.log_dir)[-1]["resumed"]["changed"]
        if changed != {"training.max_steps": [4, 6]}:
            raise Wrong(f"recorded as {changed}")
        bench.whole, whole = six, bench.whole
        try:
            bench.same_as_whole(config=False)
        finally:
            bench.whole = whole
            shutil.rmtree(six)


def finished(bench: Bench) -> None:
    """A finished run says so, and not a byte of it changes."""
    with bench.trial("finished run resumed", begun=True):
        before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in bench.log_dir.rglob("*")}
        bench.run(bench.log_dir / CONFIG, "--resume", bench.log_dir).expect(0, "is finished")
        if before != {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in bench.log_dir.rglob("*")}:
            raise Wrong("something was written")


def fork(bench: Bench) -> None:
    """Into another folder: the same bits, recorded where it came from, and the first run stays as it was."""
    with bench.trial("forked into another folder"):
        point, place = bench.whole / "checkpoints" / "step_000004", bench.root / "fork"
        shutil.rmtree(place, ignore_errors=True)
        before = {path: path.stat().st_mtime_ns for path in bench.whole.rglob("*")}
        bench.run(bench.config, "--resume", point, "--log-dir", place).expect(0, "becomes a fork of")
        bench.same_as_whole(place)
        if before != {path: path.stat().st_mtime_ns for path in bench.whole.rglob("*")}:
            raise Wrong("the first run has changed")
        if _sessions(place)[0]["resumed"]["from"] != str(point) or len(lines(place / "metrics.jsonl")) != 6:
            raise Wrong("where it comes from is not recorded")


def refusals(bench: Bench) -> None:
    """What is not asked for is never done to a run that exists, or without one."""
    with bench.trial("refused", "over a run", begun=True):
        bench.run(bench.config).expect(2, f"--resume {bench.log_dir}")
        bench.same_as_whole()
    with bench.trial("refused", "no checkpoint"):
        bench.run(bench.config, "--resume", bench.root / "printed").expect(2, "no checkpoint")
        if bench.log_dir.exists():
            raise Wrong("something was written")


def _sessions(log_dir: Path) -> list[dict[str, Any]]:
    return json.loads((log_dir / METADATA).read_text())["sessions"]


@contextmanager
def mounted(bench: Bench, *how: str) -> Iterator[Path | None]:
    """A folder that something is mounted on, None where this process may not."""
    place = bench.root / "mounted"
    place.mkdir(exist_ok=True)
    command = ["mount", *how, str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _wait(until: Any) -> None:
    deadline = time.monotonic() + 120
    while not until():
        if time.monotonic() > deadline:
            raise Wrong("it does not get on")
        time.sleep(0.005)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
