"""Running the command: in a fork of this process, which has imported everything, or really, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.torture.faults import Death, Watch

KILLED = -signal.SIGKILL
ADVICE = re.compile(r"(?:Go on|Start anew) with: (.+?)(?:, or |$)", re.MULTILINE)


class Wrong(Exception):
    """What came out is not what was promised."""


@dataclass(frozen=True)
class Outcome:
    """status: what the command returned, the negative signal that ended it. points: its changes, where they counted."""

    words: tuple[str, ...]
    status: int
    out: str
    err: str
    points: tuple[str, ...] = ()

    def expect(self, status: int, *needles: str) -> Outcome:
        """Itself. Raises Wrong where it ended in another way, or said none of it: every needle is looked for."""
        said = self.out + self.err
        missing = [needle for needle in needles if needle not in said]
        if self.status != status or missing or "Traceback" in self.err or "unexpected;" in self.err:
            raise Wrong(
                f"{shlex.join(self.words)}\nended with {self.status}, not {status}; missing: {missing}\n{said[-3000:]}"
            )
        return self

    @property
    def advice(self) -> list[str]:
        """Arguments of the command that it says to go on with. Raises Wrong where it says none."""
        found = ADVICE.search(self.err)
        if not found:
            raise Wrong(f"{shlex.join(self.words)}\nsays nothing to go on with:\n{self.err[-3000:]}")
        program, *words = shlex.split(found[1])
        if program != "retrain":
            raise Wrong(f"not a command of this program: {found[1]}")
        return words


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def fresh(*arguments: object) -> Outcome:
    """The real command, in an interpreter of its own."""
    words = tuple(map(str, arguments))
    done = subprocess.run(
        [sys.executable, "-m", "retrain", *words], capture_output=True, text=True, env=environment(), check=False
    )
    return Outcome(words, done.returncode, done.stdout, done.stderr)


def fresh_killed(cpu_seconds: float, *arguments: object) -> None:
    """The real command, killed after so much of the processor's time."""
    command = [sys.executable, "-m", "retrain", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()) as process:
        signal_after(process.pid, cpu_seconds)


@dataclass
class Forks:
    """Runs the command in forks of this process. scratch: a folder for what they print. killed: how many were."""

    scratch: Path
    killed: int = 0

    def __call__(
        self,
        *arguments: object,
        watch: Path | None = None,
        death: Death | None = None,
        cpu_seconds: float | None = None,
        number: signal.Signals = signal.SIGKILL,
        before: Callable[[], object] | None = None,
    ) -> Outcome:
        """`retrain ARGUMENTS`. watch: count the changes below this folder, and with `death` die at one of them.

        cpu_seconds: signal `number` after so much of the processor's time. before: called in the fork first.
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        words = tuple(map(str, arguments))
        child = self.start(words, watch, death, before)
        if cpu_seconds is not None:
            signal_after(child, cpu_seconds, number)
        return self.finish(child, words)

    def start(
        self,
        words: Sequence[str],
        watch: Path | None = None,
        death: Death | None = None,
        before: Callable[[], object] | None = None,
    ) -> int:
        """Process id of a fork that runs the command; `finish` waits for it."""
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            status = 70
            try:
                status = self._inside(words, watch, death, before)
            except SystemExit as end:
                status = int(end.code or 0)
            except Exception:  # noqa: BLE001 - said in what the fork printed, and a wrong status
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        return child

    def finish(self, child: int, words: Sequence[str]) -> Outcome:
        _, status = os.waitpid(child, 0)
        out, err, points = (self.scratch / f"{child}.{name}" for name in ("out", "err", "points"))
        self.killed += os.waitstatus_to_exitcode(status) == KILLED
        counted = json.loads(points.read_text()) if points.exists() else ()
        outcome = Outcome(
            tuple(words),
            os.waitstatus_to_exitcode(status),
            out.read_text() if out.exists() else "",
            err.read_text() if err.exists() else "",
            tuple(counted),
        )
        for path in (out, err, points):
            path.unlink(missing_ok=True)
        return outcome

    def _inside(
        self, words: Sequence[str], watch: Path | None, death: Death | None, before: Callable[[], object] | None
    ) -> int:
        from retrain.cli import main

        mine = self.scratch / str(os.getpid())
        for name, descriptor in (("out", 1), ("err", 2)):
            file = os.open(f"{mine}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
            os.close(file)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = ["retrain", *words]
        if before is not None:
            before()
        counter = Watch(watch, death) if watch is not None else None
        if counter is not None:
            counter.install()
        status = main(list(words))
        if counter is not None:
            Path(f"{mine}.points").write_text(json.dumps(counter.points))
        return status


def signal_after(child: int, cpu_seconds: float, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal the process once it has used that much; nothing where it ends before."""
    clock = (~child << 3) | 2  # of the process: clock_getcpuclockid(3)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.clock_gettime(clock) >= cpu_seconds:
            os.kill(child, number)
            return
        time.sleep(0.001)
