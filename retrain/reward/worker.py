"""What every judging process does: answer one question at a time, within limits of time and memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable

MEMORY_LIMIT_BYTES = 4 << 30  # a runaway power tower ends in MemoryError here, not in the trainer being killed


Judge = Callable[[str, str | None], dict]


def serve(judge: Judge, *, library: str, warm_up: tuple[str, str] | None = None) -> None:
    """Read JSON lines `[reference, answer]` from stdin and write the verdict of `judge` on each to stdout.

    A verdict is {"value": 0.0 to 1.0} or {"error": reason}; what `judge` raises is an error, in the name of `library`.
    warm_up: a first question of its own, for what is built when first needed, not within the time of a real one. The
    first line written, `{}`, says that the process is ready. It ends when its stdin closes, and dies if a question
    takes more than the seconds in its first argument.
    """
    limit_s = float(sys.argv[1])
    _limit_memory()
    # The default action, not a Python handler: it ends the process even in the middle of one long C call.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with os.fdopen(os.dup(1), "w", encoding="ascii") as answers:
        os.dup2(2, 1)  # whatever a library prints must not end up between the answers
        if warm_up:
            judge(*warm_up)
        print("{}", file=answers, flush=True)
        for line in sys.stdin.buffer:
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            verdict = _judge_or_explain(judge, library, *json.loads(line))
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps(verdict), file=answers, flush=True)


def _judge_or_explain(judge: Judge, library: str, reference: str, answer: str | None) -> dict:
    try:
        return judge(reference, answer)
    except Exception as error:  # noqa: BLE001 - SymPy may raise anything; a failed comparison is an error, not a zero
        return {"error": f"{library} failed: {type(error).__name__}: {str(error)[:200]}"}


def _limit_memory() -> None:
    if sys.platform != "linux":  # elsewhere the kernel refuses or ignores the limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > MEMORY_LIMIT_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, hard))
