"""The built-in problems: two-digit sums for `builtin:tiny`, one-digit sums in words for a small instruct model."""

from __future__ import annotations

from typing import Literal, NamedTuple

from retrain.types import ConfigError, Example

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Several phrasings of the same sum, because 100 problems alone would be seen again within a few dozen steps.
WORDED = (
    "What is {a} plus {b}?",
    "What do you get when you add {a} and {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
)
# Small models hardly ever follow "put the answer in \boxed{}", but they do go on with a sentence that has been begun.
WORDED_INSTRUCTION = r"Complete: {a} plus {b} equals \boxed{{"


class Problem(NamedTuple):
    """`left op right` over whole numbers; the answer is never negative."""

    left: int
    op: Literal["+", "-"]
    right: int

    @property
    def answer(self) -> int:
        return self.left + self.right if self.op == "+" else self.left - self.right

    @property
    def question(self) -> str:
        return f"What is {self.left} {self.op} {self.right}?"


def problems() -> list[Problem]:
    """Every two-digit addition, and every two-digit subtraction with a positive answer: 12 105 problems."""
    two_digit = range(10, 100)
    additions = [Problem(left, "+", right) for left in two_digit for right in two_digit]
    subtractions = [Problem(left, "-", right) for left in two_digit for right in range(10, left)]
    return additions + subtractions


def load(variant: str = "") -> list[Example]:
    """All examples of a variant, without duplicates, in an order that is mixed but the same everywhere.

    variant: "" for two-digit additions and subtractions in symbols ("What is 47 + 38?", reference "85"), "words" for
    one-digit additions in words, with the answer begun as \\boxed{ and the reference in digits.
    Raises ConfigError for any other variant.
    """
    if variant == "":
        examples = [Example(problem.question, str(problem.answer)) for problem in problems()]
    elif variant == "words":
        examples = [
            Example(f"{phrase} {WORDED_INSTRUCTION}".format(a=word_a, b=word_b), str(a + b))
            for phrase in WORDED
            for a, word_a in enumerate(NUMBER_WORDS)
            for b, word_b in enumerate(NUMBER_WORDS)
        ]
    else:
        raise ConfigError(
            f'[data] source: "arithmetic" has no variant "{variant}". Write "arithmetic" (two-digit sums in symbols) '
            'or "arithmetic:words" (one-digit sums in words).'
        )
    # Sorting by content hash mixes the kinds of problem, so that the first few hundred are a fair sample of all.
    return sorted(examples, key=lambda example: example.id)
