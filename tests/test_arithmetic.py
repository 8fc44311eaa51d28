"""The built-in data source: every reference is recomputed from the prompt's text alone."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from retrain.data.arithmetic import load
from retrain.types import ConfigError

DIGITS = {
    word: value
    for value, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
}


def answer_of_symbols(prompt: str) -> int:
    match = re.fullmatch(r"What is (\d\d) ([+-]) (\d\d)\?", prompt)
    assert match, prompt
    left, op, right = match.groups()
    return int(left) + int(f"{op}{right}")


def answer_of_words(prompt: str) -> int:
    """Whatever the phrasing, exactly two number words stand in the question, and they are to be added."""
    question, _, instruction = prompt.partition(" Complete:")
    assert instruction.endswith(r" equals \boxed{")
    numbers = [DIGITS[word] for word in re.findall(r"[a-z]+", question.lower()) if word in DIGITS]
    assert len(numbers) == 2, prompt
    return sum(numbers)


@pytest.mark.parametrize(
    ("variant", "answer_of", "count"), [("", answer_of_symbols, 12_105), ("words", answer_of_words, 400)]
)
def test_references_are_right_and_no_problem_stands_twice(variant, answer_of, count):
    examples = load(variant)
    assert len(examples) == count
    assert [e.reference for e in examples] == [str(answer_of(e.prompt)) for e in examples]
    assert len({e.prompt for e in examples}) == len({e.id for e in examples}) == count


@pytest.mark.parametrize("variant", ["", "words"])
def test_order_is_the_same_in_every_process(variant):
    program = f"from retrain.data.arithmetic import load; print([e.id for e in load({variant!r})])"
    # Another hash seed, so that an order that came from a set or a dict of strings would show.
    fresh = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert fresh.stdout.strip() == str([e.id for e in load(variant)])


def test_any_stretch_is_a_fair_sample():
    """`max_examples` takes the first ones: they must not be all additions, nor all small numbers."""
    first = load()[:400]
    additions = sum("+" in e.prompt for e in first) / len(first)
    assert abs(additions - 8100 / 12_105) < 0.1
    assert abs(sum(int(e.prompt[8:10]) for e in first) / len(first) - 59.5) < 5


def test_unknown_variant_names_the_known_ones():
    with pytest.raises(ConfigError) as error:
        load("word")
    assert '"word"' in str(error.value)
    assert '"arithmetic:words"' in str(error.value)
