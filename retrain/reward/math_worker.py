"""The process that judges mathematical equivalence, one question at a time: `python -m retrain.reward.math_worker S`.

It reads JSON lines `[reference, answer]` from stdin and answers each on stdout, with `{"value": 0.0 or 1.0}` or
`{"error": reason}`; `answer` is the content of a response's box, or null where it has none. The first line it writes,
`{}`, says that it is ready. It ends when its stdin closes, and dies if a question takes more than S seconds.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from dataclasses import replace
from functools import lru_cache

from latex2sympy2_extended import normalize_latex
from math_verify import LatexExtractionConfig, verify
from math_verify.parser import parse_latex_cached

from retrain.reward.boxed import last_box

MEMORY_LIMIT_BYTES = 4 << 30  # a runaway power tower ends in MemoryError here, not in the trainer being killed

# Boxes are taken apart by `last_box` alone, so that reward `match` and reward `math` judge the same text.
_NORMALIZATION = replace(LatexExtractionConfig().normalization_config, boxed="none")

# math-verify drops the comma and the negative space of 10,\!000, but reads 1\,234 as the mixed number 1 + 234.
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,;:! ]|~|\{,\}| )\d{3})+(?!\d)")


def _parse(latex: str):
    """SymPy's view of one LaTeX expression, or None when it is not one."""
    latex = _SPACED_THOUSANDS.sub(lambda number: re.sub(r"\D", "", number.group()), latex)
    try:
        return parse_latex_cached(normalize_latex(latex, _NORMALIZATION))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001 - latex2sympy reports a syntax error as a bare Exception
        return None


@lru_cache(maxsize=4096)
def _parse_reference(reference: str):
    return _parse(last_box(reference) or reference)


def judge(reference: str, answer: str | None) -> dict:
    """The verdict on one answer. The gold expression goes first: `verify` takes its form as the binding one."""
    gold = _parse_reference(reference)
    if gold is None:
        return {"error": f"the reference {reference[:80]!r} is not a mathematical expression"}
    prediction = None if answer is None else _parse(answer)
    if prediction is None:
        return {"value": 0.0}
    # math-verify's own limit is an alarm; the limit here is the life of this process.
    return {"value": float(verify(gold, prediction, timeout_seconds=None, raise_on_error=True))}


def _judge_or_explain(reference: str, answer: str | None) -> dict:
    try:
        return judge(reference, answer)
    except Exception as error:  # noqa: BLE001 - SymPy may raise anything; a failed comparison is an error, not a zero
        return {"error": f"math-verify failed: {type(error).__name__}: {str(error)[:200]}"}


def _limit_memory() -> None:
    if sys.platform != "linux":  # elsewhere the kernel refuses or ignores the limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > MEMORY_LIMIT_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, hard))


def main() -> None:
    limit_s = float(sys.argv[1])
    _limit_memory()
    # The default action, not a Python handler: it ends the process even in the middle of one long C call.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with os.fdopen(os.dup(1), "w", encoding="ascii") as answers:
        os.dup2(2, 1)  # whatever a library prints must not end up between the answers
        judge("1", "1")  # builds the parser's tables now, not within the first question's time
        print("{}", file=answers, flush=True)
        for line in sys.stdin.buffer:
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            verdict = _judge_or_explain(*json.loads(line))
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps(verdict), file=answers, flush=True)


if __name__ == "__main__":
    main()
