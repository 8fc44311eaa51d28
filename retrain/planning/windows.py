"""A text cut into the windows that the semantic detector classifies."""

from __future__ import annotations

import re
from itertools import pairwise

WINDOW_WORDS = 12

# An end is followed by a space: the points in 3.5 and 3:5 are none.
_SENTENCE = re.compile(r"\S(?:[^\n]*?[.!?…]['\"\u201d\u2019)\]*]*(?=\s)|[^\n]*)")
# What leads in something else plans or not by itself ("Let me check: 77 - 27 = 50"); a mere label ("Tens:") does not.
_CLAUSE = re.compile(r"\S+(?:\s+\S+?){2,}?[:;](?=\s)|\S.*")
# What has no spaces (junk of an untrained model, Chinese) is cut as well: a window must fit into the encoder.
_WORD = re.compile(r"\S{1,20}")
_SIGNS = r"+*/\u00d7\u00f7=<>^-"
_FORMULA = re.compile(rf"[{_SIGNS}]*\d+(?:[\s.,:(){_SIGNS}]*\d+)*(?:\s*[{_SIGNS}]+)*")


def windows(text: str) -> list[tuple[int, int]]:
    """Character spans of the windows, in order and without overlap; what lies between them is whitespace.

    A window is a sentence (or a line, or a part of three words or more in front of a colon or semicolon); one of more
    than WINDOW_WORDS words is cut into the fewest parts of about equal length. Windows of a fixed number of words would
    mix the planning sentence with its neighbours.
    """
    spans = []
    for sentence in _SENTENCE.finditer(text):
        for clause in _CLAUSE.finditer(text, *sentence.span()):
            words = [word.span() for word in _WORD.finditer(text, *clause.span())]
            parts = -(-len(words) // WINDOW_WORDS)
            cuts = [len(words) * part // parts for part in range(parts + 1)]
            spans += [(words[first][0], words[last - 1][1]) for first, last in pairwise(cuts)]
    return spans


def as_embedded(window: str) -> str:
    """What the encoder sees of a window: calculations with numbers as 0, spaces as one, "" where no letter is left.

    Which numbers are added says nothing about planning, and windows that differ in them alone need one embedding.
    """
    plain = _FORMULA.sub("0", " ".join(window.split()))
    return plain if any(char.isalpha() for char in plain) else ""
