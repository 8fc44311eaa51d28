"""Try the `math` reward on real problems: a folder of .jsonl files in the layout of hendrycks MATH.

python scripts/audit_math_reward.py FOLDER [--pairs 2000] [--scorings 10000] [--threads 16]

1. Every reference (the last box of a solution) is scored against itself: what is not 1.0 is listed.
2. Random wrong pairs (the answer of another problem, differing after normalisation): what is accepted is listed, to be
   judged by eye.
3. Scorings from many threads at once; every one must bring a value or an error.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from retrain.boxed import last_box
from retrain.reward import Scorer, open_scorer
from retrain.types import Score

_NOISE = re.compile(r"\s|\\left|\\right|\\[,;:!]|\$|\\text\{[^}]*\}|\.$")


def references_in(folder: Path) -> list[str]:
    """The last box of every solution that has one."""
    solutions = [json.loads(line)["solution"] for file in sorted(folder.glob("*.jsonl")) for line in file.open()]
    boxes = [last_box(solution) for solution in solutions]
    print(f"{len(solutions)} problems, {boxes.count(None)} without a box in their solution")
    return [box for box in boxes if box is not None]


def normal(answer: str) -> str:
    """An answer as a string match would compare it: without spaces, sizes of brackets and units."""
    return _NOISE.sub("", answer.replace("dfrac", "frac").replace("tfrac", "frac"))


def wrong_pairs(references: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """(answer, reference) of different problems, different after normalisation."""
    draw, pairs = random.Random(seed), []
    while len(pairs) < count:
        answer, reference = draw.choice(references), draw.choice(references)
        if normal(answer) != normal(reference):
            pairs.append((answer, reference))
    return pairs


def score_all(scorer: Scorer, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    start = time.perf_counter()
    scores = scorer.score([rf"\boxed{{{answer}}}" for answer, _ in pairs], [reference for _, reference in pairs])
    print(f"   {len(pairs) / (time.perf_counter() - start):.0f} scorings/s")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Try the math reward on real problems.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--scorings", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    references = references_in(args.folder)
    with closing(open_scorer("math")) as scorer:
        print("1. every reference against itself")
        own = [(reference, reference) for reference in references]
        failed = [(pair[0], score) for pair, score in zip(own, score_all(scorer, own), strict=True) if score.value != 1]
        print(f"   {len(own) - len(failed)} of {len(own)} equal themselves; not:")
        for reference, score in failed:
            print(f"   {reference!r}: {score.value} {score.error or ''}")

        print(f"2. {args.pairs} wrong pairs")
        wrong = wrong_pairs(references, args.pairs, args.seed)
        verdicts = score_all(scorer, wrong)
        accepted = [pair for pair, score in zip(wrong, verdicts, strict=True) if score.value == 1]
        errors = [(pair, score.error) for pair, score in zip(wrong, verdicts, strict=True) if score.value is None]
        print(f"   {len(accepted)} accepted, {len(errors)} errors; to be judged by eye (answer, reference):")
        for pair in accepted:
            print(f"   {pair[0]!r}  {pair[1]!r}")
        for pair, error in errors:
            print(f"   error: {pair} {error}")

        print(f"3. {args.scorings} scorings from {args.threads} threads")
        many = wrong_pairs(references, args.scorings, args.seed + 1)
        start = time.perf_counter()
        with ThreadPoolExecutor(args.threads) as pool:
            got = list(pool.map(lambda pair: scorer.score([rf"\boxed{{{pair[0]}}}"], [pair[1]])[0], many))
        lost = [score for score in got if (score.value is None) == (score.error is None)]
        print(
            f"   {len(got)} verdicts, {sum(s.error is not None for s in got)} errors, {len(lost)} without either, "
            f"{len(got) / (time.perf_counter() - start):.0f} scorings/s"
        )


if __name__ == "__main__":
    main()
