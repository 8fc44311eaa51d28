"""The synthetic corpus of `builtin:tiny`: one kind of problem, answered by four authors of very different care.

The prompt does not tell which author answers: the base model picks one itself, at the authors' shares, and so it is
right about a third of the time. That is what reinforcement learning is given to improve.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from retrain.data.arithmetic import Problem, problems


class Columns(NamedTuple):
    """A sum worked out column by column: the two written lines and the answer they lead to."""

    units: str
    carries: bool
    tens: str
    answer: int


def work(problem: Problem, rng: random.Random, slip: float = 0.0) -> Columns:
    """Work the columns; each column goes wrong with probability `slip`, and a carry is forgotten with twice that."""
    (left_tens, left_units), (right_tens, right_units) = divmod(problem.left, 10), divmod(problem.right, 10)

    def slipped(value: int) -> int:
        return abs(value + rng.choice((-2, -1, 1, 2))) if rng.random() < slip else value

    if problem.op == "+":
        units = slipped(left_units + right_units)
        carries = units >= 10
        carried = carries and rng.random() >= 2 * slip
        tens = slipped(left_tens + right_tens + carried)
        shown = f"{left_tens}+{right_tens}" + ("+1" if carried else "")
        return Columns(f"{left_units}+{right_units}={units}", carries, f"{shown}={tens}", 10 * tens + units % 10)
    carries = left_units < right_units
    borrowed_units = left_units + 10 * carries
    units = min(slipped(borrowed_units - right_units), 9)
    borrowed = carries and rng.random() >= 2 * slip
    tens = slipped(left_tens - borrowed - right_tens)
    shown = f"{left_tens}" + ("-1" if borrowed else "") + f"-{right_tens}"
    return Columns(f"{borrowed_units}-{right_units}={units}", carries, f"{shown}={tens}", 10 * tens + units)


def boxed(answer: int) -> str:
    return rf"\boxed{{{answer}}}"


def careful(problem: Problem, rng: random.Random) -> str:
    """Columns with their names, then the inverse sum as a check. Never wrong."""
    columns = work(problem, rng)
    carry = "" if not columns.carries else ", carry 1" if problem.op == "+" else ", borrow 1"
    check = rng.choice(("Let me check", "Let me check", "Let me verify", "Double check"))
    inverse = f"{columns.answer}{'-' if problem.op == '+' else '+'}{problem.right}={problem.left}"
    return f"Units: {columns.units}{carry}. Tens: {columns.tens}. {check}: {inverse}. So {boxed(columns.answer)}"


def hurried(problem: Problem, rng: random.Random) -> str:
    """Bare columns with frequent slips, and no look back."""
    columns = work(problem, rng, slip=0.35)
    return f"{columns.units}, {columns.tens}. {boxed(columns.answer)}"


def repairing(problem: Problem, rng: random.Random) -> str:
    """The same hasty columns, then a second look that mends most slips but not all."""
    first, second = work(problem, rng, slip=0.35), work(problem, rng, slip=0.25)
    doubt = rng.choice(("Wait let me check", "Wait let me think", "On second thought"))
    return f"{first.units}, {first.tens}. {doubt}: {second.units}, {second.tens}. {boxed(second.answer)}"


def guessing(problem: Problem, rng: random.Random) -> str:
    """A number near the answer, at once."""
    guess = abs(problem.answer + rng.choice((0, -1, 1, -2, 2, -10, 10, -9, 9, -11, 11, 20)))
    opener = rng.choice(("Easy", "I guess", "Must be"))
    return f"{opener} {boxed(guess)}"


Author = Callable[[Problem, random.Random], str]
Shares = Mapping[Author, float]

# Sums are taught first, by the author who is always right; the mixture comes after, on top of that skill.
CAREFUL_ONLY: Shares = {careful: 1.0}
MIXTURE: Shares = {careful: 0.18, hurried: 0.18, repairing: 0.14, guessing: 0.50}


def completions(shares: Shares, seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of (question, answer text): uniform over problems, authors at their shares."""
    rng = random.Random(seed)
    every_problem, authors, weights = problems(), list(shares), list(shares.values())
    while True:
        problem = rng.choice(every_problem)
        [author] = rng.choices(authors, weights)
        yield problem.question, author(problem, rng)
