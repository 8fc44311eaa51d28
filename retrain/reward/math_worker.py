"""The process that judges mathematical equivalence, one question at a time: `python -m retrain.reward.math_worker S`.

It reads JSON lines `[reference, answer]` from stdin and answers each on stdout, with `{"value": 0.0 or 1.0}` or
`{"error": reason}`; `answer` is the content of a response's box, or null where it has none. The first line it writes,
`{}`, says that it is ready. It ends when its stdin closes, and dies if a question takes more than S seconds.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from latex2sympy2_extended import normalize_latex
from math_verify import LatexExtractionConfig, verify
from math_verify.parser import parse_latex_cached

from retrain.boxed import last_box
from retrain.reward.worker import serve

# Boxes are taken apart by `last_box` alone, so that reward `match` and reward `math` judge the same text.
_NORMALIZATION = replace(LatexExtractionConfig().normalization_config, boxed="none")

# math-verify drops the comma and the negative space of 10,\!000, but reads 1\,234 as the mixed number 1 + 234.
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,?\\[,;:! ]|~|\{,\}| )\d{3})+(?!\d)")

# What math-verify does not read: 2 1/2, \frac \pi4, and the full stop of the sentence that a box ends.
_MIXED = re.compile(r"(?<![\w.,/^{}])(\d+) +(\d+)/(\d+)(?![\d.])")
_BARE_FRACTION = re.compile(r"\\[dt]?frac\s*(\\pi|\d)\s*(\\pi|\d)(?![A-Za-z])")
_FULL_STOP = re.compile(r"(?<!\\)[.,;]\s*$")

# It drops the base of a numeral, so that 12_8 would equal 12_9.
_BASED = re.compile(r"\s*[0-9A-Fa-f]+_\{?(\d+)\}?\s*")

LONGEST = 10_000  # characters; nobody's answer is longer, and a parser's time grows faster than its input


def _parse(latex: str):
    """SymPy's view of one LaTeX expression, or None when it is not one."""
    try:
        return parse_latex_cached(normalize_latex(_tidy(latex), _NORMALIZATION))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001 - latex2sympy reports a syntax error as a bare Exception
        return None


def _tidy(latex: str) -> str:
    latex = _SPACED_THOUSANDS.sub(lambda number: re.sub(r"\D", "", number.group()), _FULL_STOP.sub("", latex))
    return _BARE_FRACTION.sub(r"\\frac{\1}{\2}", _MIXED.sub(r"\1\\frac{\2}{\3}", latex))


def _have_two_bases(reference: str, answer: str) -> bool:
    bases = [_BASED.fullmatch(text) for text in (last_box(reference) or reference, answer)]
    return len({base[1] for base in bases if base}) == 2


@lru_cache(maxsize=4096)
def _parse_reference(reference: str):
    return _parse(last_box(reference) or reference)


def judge(reference: str, answer: str | None) -> dict:
    """The verdict on one answer. The gold expression goes first: `verify` takes its form as the binding one."""
    gold = _parse_reference(reference)
    if gold is None:
        return {"error": f"the reference {reference[:80]!r} is not a mathematical expression"}
    if answer is None:
        return {"value": 0.0}
    if len(answer) > LONGEST:
        return {"error": f"the answer has {len(answer)} characters; more than {LONGEST} are not judged"}
    prediction = _parse(answer)
    if prediction is None or _have_two_bases(reference, answer):
        return {"value": 0.0}
    # math-verify's own limit is an alarm; the limit here is the life of this process.
    return {"value": float(verify(gold, prediction, timeout_seconds=None, raise_on_error=True))}


if __name__ == "__main__":
    serve(judge, library="math-verify", warm_up=("1", "1"))
