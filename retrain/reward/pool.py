"""Judging in worker processes that are killed when the time is up: an error, with its reason, never a score of 0.

SymPy can take forever on an input a model writes in one line (`9^{9^{9^9}}`), and nothing inside a process stops it
reliably: alarms work on the main thread only and not within one long C call.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from retrain.plugin import child_environment
from retrain.types import RetrainError, Score

START_LIMIT_S = 120.0
ORPHAN_GRACE_S = 2.0  # a busy worker whose parent died ends itself this long after its time is up
MAX_WORKERS = 4


class PoolScorer:
    """A pool of worker processes; they start when first needed and stay until `close`. Any thread may call `score`.

    module: what a worker runs, by `retrain.reward.worker.serve`. answer_of: takes the answer out of a response.
    workers: how many at most; 0 means one for each core, four at most. timeout_s: seconds one comparison may take.
    """

    def __init__(
        self, module: str, answer_of: Callable[[str], str | None], *, workers: int = 0, timeout_s: float = 10.0
    ) -> None:
        count = workers or min(MAX_WORKERS, os.cpu_count() or 1)
        self._module, self._answer_of, self._timeout_s = module, answer_of, timeout_s
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="reward")
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # last in, first out: the warm ones are used
        for _ in range(count):
            self._idle.put(None)
        self._close = weakref.finalize(self, _close_pool, self._executor, self._idle, count)

    def score(
        self, responses: Sequence[str], references: Sequence[str], prompts: Sequence[str] | None = None
    ) -> list[Score]:
        """One score a response. Equal answers to one reference, common within a group, are judged once.

        Raises RetrainError when no worker can be started.
        """
        pairs = [(ref, self._answer_of(response)) for response, ref in zip(responses, references, strict=True)]
        verdicts = {pair: self._executor.submit(self._judge, *pair) for pair in dict.fromkeys(pairs)}
        try:
            return [verdicts[pair].result() for pair in pairs]
        finally:  # after an interrupt nothing more is started
            for verdict in verdicts.values():
                verdict.cancel()

    def figures(self) -> dict[str, float | None]:
        return {}

    def close(self) -> None:
        """End all workers. A comparison under way is waited for: `timeout_s` at most."""
        self._close()

    def _judge(self, reference: str, answer: str | None) -> Score:
        worker = self._idle.get()
        try:
            if worker is not None and not worker.alive:
                worker.end()
                worker = None
            worker = worker or _Worker(self._module, self._timeout_s)
            return worker.judge(reference, answer)
        finally:
            self._idle.put(worker)


def _close_pool(executor: ThreadPoolExecutor, idle: queue.LifoQueue[_Worker | None], count: int) -> None:
    executor.shutdown(wait=True, cancel_futures=True)
    for _ in range(count):
        worker = idle.get()
        if worker is not None:
            worker.end()


class _Worker:
    """One worker process, asked by one thread at a time. It is dead after a time-out or a crash."""

    def __init__(self, module: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-m", module, str(timeout_s + ORPHAN_GRACE_S)],
                env=child_environment(),  # with a fixed hash seed, SymPy's verdicts are reproducible
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the run, which still wants its scores
            )
        except OSError as error:
            raise RetrainError(f"the reward's worker process {module} cannot be started: {error}") from error
        if self._read(START_LIMIT_S) is None:
            raise RetrainError(
                f"the reward's worker process did not start ({self._ending()}); "
                f"to see why, run: {sys.executable} -m {module} 10 </dev/null"
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def judge(self, reference: str, answer: str | None) -> Score:
        start = time.monotonic()
        verdict = self._read(self._timeout_s, json.dumps([reference, answer]))
        if verdict is not None:
            return Score(verdict.get("value"), verdict.get("error"))
        question = f"comparing {_short(answer)} with the reference {_short(reference)}"
        if time.monotonic() - start >= self._timeout_s:
            return Score(None, f"{question} took longer than {self._timeout_s:g} s")
        return Score(None, f"the worker died while {question} ({self._ending()})")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # an unread question is flushed once more on closing
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]

    def _read(self, limit_s: float, question: str | None = None) -> dict | None:
        """Write the question if any, and read one line; None, and the process is dead, where none came in time."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        start = time.monotonic()
        timer = threading.Timer(limit_s, self._process.kill)  # ends a blocked write or read as well
        timer.daemon = True
        timer.start()
        line = b""
        with contextlib.suppress(BrokenPipeError):
            if question is not None:
                stdin.write(question.encode() + b"\n")
                stdin.flush()
            line = stdout.readline()
        timer.cancel()
        complete = line.endswith(b"\n")
        if not complete or time.monotonic() - start >= limit_s:  # a late answer counts, but the kill is on its way
            self.end()
        return json.loads(line) if complete else None

    def _ending(self) -> str:
        status = self._process.returncode
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _short(text: str | None) -> str:
    return "no answer" if text is None else repr(text if len(text) <= 80 else f"{text[:80]}...")
