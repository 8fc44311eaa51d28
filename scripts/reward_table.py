r"""What the `math` reward makes of answers that are known to trip graders: the table in docs/rewards.md.

python scripts/reward_table.py            score them and write the table, with the time that each took
python scripts/reward_table.py --check    exit 1 when a verdict is not the one expected here
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from pathlib import Path

from retrain.reward import open_scorer
from retrain.types import Score

PAGE = Path(__file__).parents[1] / "docs" / "rewards.md"
BEGIN, END = "<!-- begin: written by scripts/reward_table.py -->", "<!-- end -->"
SHOWN = 44

# (trap, reference, response, verdict). A response without a box of its own is the content of one.
TRAPS = (
    ("no box", "7", "The answer is 7.", "wrong"),
    ("empty box", "7", r"\boxed{}", "wrong"),
    ("unclosed box", "7", r"\boxed{7", "wrong"),
    ("unclosed last box", "7", r"\boxed{7} or \boxed{7", "wrong"),
    ("the last box counts", "7", r"\boxed{7}, no, \boxed{8}", "wrong"),
    ("nested braces", r"\frac{1}{\sqrt{2}}", r"\frac{1}{\sqrt{2}}", "right"),
    ("escaped braces", r"\{1, 2\}", r"\{1, 2\}", "right"),
    (r"\dfrac", r"\frac{1}{2}", r"\dfrac{1}{2}", "right"),
    ("fraction without braces", r"\frac{1}{2}", r"\tfrac12", "right"),
    ("fraction without braces", r"\frac{\pi}{4}", r"\frac \pi4", "right"),
    ("decimal", r"\frac{1}{2}", "0.5", "right"),
    ("another fraction", r"\frac{1}{2}", r"\frac{1}{3}", "wrong"),
    ("rounded to two places", r"\frac{1}{3}", "0.33", "wrong"),
    ("rounded to six places", r"\frac{1}{3}", "0.333333", "right"),
    (r"\text{}", "yes", r"\text{yes}", "right"),
    (r"\text{}", "yes", r"\text{no}", "wrong"),
    (r"empty \text{}", "7", r"\text{}", "wrong"),
    ("choice", "B", r"\textbf{(B)}", "right"),
    ("unit", "12", r"12\text{ cm}", "right"),
    ("unit with a power", r"12\text{ cm}^2", "12", "right"),
    ("another unit: not looked at", r"12\text{ cm}", r"12\text{ m}", "right"),
    ("degrees", "90", r"90^\circ", "right"),
    ("dollars", "5", r"\$5", "right"),
    ("percent", r"50\%", "50", "right"),
    ("percent", r"50\%", "0.5", "right"),
    ("percent", r"5\%", r"50\%", "wrong"),
    ("interval", "[1,2)", r"\left[1, 2\right)", "right"),
    ("interval, another end", "[1,2)", "[1,2]", "wrong"),
    ("union", r"(-\infty,3]\cup[5,\infty)", r"[5,\infty)\cup(-\infty,3]", "right"),
    ("inequality as interval", "1 < x < 2", "(1,2)", "right"),
    ("interval as inequality", "(1,2)", "1 < x < 2", "wrong"),
    ("set, another order", r"\{1,2\}", r"\{2,1\}", "right"),
    ("set without braces", r"\{1,2\}", "2, 1", "right"),
    ("set, one more", r"\{1,2\}", r"\{1,2,3\}", "wrong"),
    ("pair, another order", "(1,2)", "(2,1)", "wrong"),
    ("several guesses", "7", "7 or 8", "wrong"),
    ("several guesses", "7", "7, 8", "wrong"),
    ("matrix", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", "right"),
    ("matrix, transposed", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", "wrong"),
    ("mixed number", r"2\frac{1}{2}", r"\frac{5}{2}", "right"),
    ("mixed number", "2.5", "2 1/2", "right"),
    ("mixed number, no product", r"2\frac{1}{2}", "1", "wrong"),
    ("negative mixed number", "-2.5", r"-2\frac{1}{2}", "right"),
    ("thousands", "1234567", "1,234,567", "right"),
    ("thousands", "10000", r"10,\!000", "right"),
    ("thousands", "10000", "10{,}000", "right"),
    ("thousands", "1234", r"1\,234", "right"),
    ("thousands in a fraction", r"\frac{12}{5525}", r"\frac{12}{5,\!525}", "right"),
    ("no thousands", "123", "1,23", "wrong"),
    ("x = 5", "5", "x = 5", "right"),
    ("x = 5", "x = 5", "5", "right"),
    ("y = 5", "x = 5", "y = 5", "wrong"),
    ("line", "y = 2x + 1", "y = 1 + 2x", "right"),
    ("full stop", "7", "7.", "right"),
    ("plus or minus", r"\pm 3", "3, -3", "right"),
    ("plus or minus, half of it", r"\pm 3", "3", "wrong"),
    ("another base", "12_8", "12_9", "wrong"),
    ("base left out", "12_8", "12", "right"),
    ("ratio", "3:2", r"\frac{3}{2}", "right"),
    ("division by zero", "3", r"\frac{1}{0}", "wrong"),
    ("no mathematics", "3", "!!", "wrong"),
    ("a reference that is none", "!!", "3", "error"),
    ("a number of 10^6 digits", "3", "7" * 10**6, "error"),
    ("3,000 brackets", "3", "(" * 3000 + "3" + ")" * 3000, "error"),
    ("power tower", "3", "9^{9^{9^9}}", "error"),
    ("factorial of a factorial", "3", "(10!)!", "error"),
)


def verdict_of(score: Score) -> str:
    """right, wrong or error."""
    return "error" if score.value is None else {1.0: "right", 0.0: "wrong"}[score.value]


def judged() -> list[tuple[Score, float]]:
    """Score and seconds of each trap, one at a time, by one worker."""
    results = []
    with closing(open_scorer("math", workers=1)) as scorer:
        scorer.score([r"\boxed{1}"], ["1"])  # starts the worker
        for _, reference, response, _ in TRAPS:
            start = time.perf_counter()
            (score,) = scorer.score([boxed(response)], [reference])
            results.append((score, time.perf_counter() - start))
    return results


def boxed(response: str) -> str:
    """The response as it is, or in a box where it is an answer alone."""
    return response if "box" in response or response.endswith("is 7.") else rf"\boxed{{{response}}}"


def table(results: list[tuple[Score, float]]) -> str:
    lines = ["| Trap | Reference | Answer | Verdict | ms |", "|---|---|---|---|---|"]
    for (trap, reference, response, _), (score, seconds) in zip(TRAPS, results, strict=True):
        lines.append(
            f"| {trap} | `{_shown(reference)}` | `{_shown(response)}` | {verdict_of(score)} | {seconds * 1000:.0f} |"
        )
    return "\n".join(lines)


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."


def main() -> int:
    parser = argparse.ArgumentParser(description="Score the known traps of the math reward.")
    parser.add_argument("--check", action="store_true", help="only say whether the verdicts are as expected")
    check = parser.parse_args().check
    results = judged()
    wrong = [trap for trap, (score, _) in zip(TRAPS, results, strict=True) if verdict_of(score) != trap[3]]
    for trap, reference, response, expected in wrong:
        print(f"{trap}: {_shown(response)} for {_shown(reference)} is not {expected}", file=sys.stderr)
    if not check and not wrong:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        page = f"{before}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}"
        PAGE.write_text(page, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
