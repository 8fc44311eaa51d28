"""The windows of the semantic detector, and what the encoder sees of them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.planning.windows import WINDOW_WORDS, as_embedded, windows


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end in windows(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        (" \n ", []),
        ("Wait. Is it 3.5? Yes!", ["Wait.", "Is it 3.5?", "Yes!"]),
        ('He said "no." Then', ['He said "no."', "Then"]),
        ("first line\nsecond  line\n", ["first line", "second  line"]),
        ("Hmm... so what", ["Hmm...", "so what"]),
        ("Tens: 4+3=7.", ["Tens: 4+3=7."]),
        ("Let me check: 85-38=47.", ["Let me check:", "85-38=47."]),
        ("we know a; then b follows: c", ["we know a;", "then b follows:", "c"]),
        ("at 3:5 or 7", ["at 3:5 or 7"]),
        ("é 😀 ñ. 你好", ["é 😀 ñ.", "你好"]),
    ],
)
def test_sentences_lines_and_clauses(text, found):
    assert cut(text) == found


def test_long_sentences_are_cut_into_about_equal_parts():
    words = [f"word{n}" for n in range(26)]
    assert [len(part.split()) for part in cut(" ".join(words))] == [8, 9, 9]
    assert [len(part.split()) for part in cut(" ".join(words[:WINDOW_WORDS]))] == [WINDOW_WORDS]
    assert [len(part) for part in cut("x" * 250)] == [120, 130]


@given(st.text(alphabet=st.one_of(st.sampled_from(" \n.:;!?a5é😀\u2028\t"), st.characters()), max_size=300))
def test_windows_hold_everything_but_spaces_once(text):
    spans = windows(text)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges) and all(start < end for start, end in spans)
    assert "".join("".join(cut(text)).split()) == "".join(text.split())
    for window in cut(text):
        assert "\n" not in window and len(window.split()) <= WINDOW_WORDS


@pytest.mark.parametrize("text", ["a ", "a", "ab: ", "!", ".)", ". ", "\n", "a b:c ", "- ", "1+"])
def test_a_hundred_thousand_characters_take_no_time(text):
    began = time.perf_counter()
    for window in cut(text * (100_000 // len(text))):
        as_embedded(window)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("window", "embedded"),
    [
        ("So 47 + 38 = 85.", "So 0."),
        ("x = 3.5 and y=2", "x = 0 and y0"),
        ("7+8=15.", ""),
        ("... 12 ", ""),
        ("Wait,\n  what", "Wait, what"),
        ("\\boxed{67}", "\\boxed{0}"),
    ],
)
def test_calculations_are_one_number_to_the_encoder(window, embedded):
    assert as_embedded(window) == embedded
