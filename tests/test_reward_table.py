"""The known traps of the `math` reward: verdicts, the table in the documentation, and scoring from many threads."""

from __future__ import annotations

import runpy
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from retrain.reward import open_scorer
from retrain.types import Score

ROOT = Path(__file__).parents[1]
table = runpy.run_path(str(ROOT / "scripts" / "reward_table.py"))


@pytest.fixture(scope="module")
def math():
    """Patient: the machine may be busy with other tests."""
    with closing(open_scorer("math", workers=2, timeout_s=60.0)) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def impatient():
    with closing(open_scorer("math", workers=1, timeout_s=1.0)) as scorer:
        yield scorer


@pytest.mark.parametrize(("trap", "reference", "response", "verdict"), table["TRAPS"])
def test_verdict(math, impatient, trap, reference, response, verdict):
    (score,) = (impatient if verdict == "error" else math).score([table["boxed"](response)], [reference])
    assert table["verdict_of"](score) == verdict, score


def test_the_documented_table_has_these_verdicts():
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = page.partition(table["BEGIN"])[2].partition(table["END"])[0].strip().splitlines()[2:]
    score = {"right": Score(1.0), "wrong": Score(0.0), "error": Score(None, "x")}
    expected = table["table"]([(score[verdict], 0.0) for *_, verdict in table["TRAPS"]]).splitlines()[2:]
    assert [row.rpartition(" | ")[0] for row in rows] == [row.rpartition(" | ")[0] for row in expected]


def test_no_error_is_lost_between_threads(math):
    """As math-verify's own alarm would be: off the main thread it makes every score 0."""
    cases = [(rf"\boxed{{{n}}}", str(n % 7) if n % 5 else "!!") for n in range(500)]
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda case: math.score([case[0]], [case[1]])[0], cases))
    for n, score in enumerate(scores):
        if n % 5 == 0:
            assert score.value is None and "'!!' is not a mathematical expression" in score.error
        else:
            assert score == Score(float(n < 7))
