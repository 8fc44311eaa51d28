"""Strategic grams: the phrases whose tokens plan (`[logging] strategic_grams`)."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence

from retrain.types import ConfigError

DEFAULT_GRAMS = (
    "wait let me",
    "let me think",
    "on second thought",
    "let me check",
    "let me verify",
    "is this right",
    "double check",
    "try another approach",
    "go back and",
    "start over",
    "that's not right",
    "that doesn't work",
    "another way to",
    "or we could",
    "what if we",
    "notice that",
    "the key is",
    "the key insight",
)

_KEY = "logging.strategic_grams"
_EXAMPLE = """write strategic_grams = 'let me check, start over' or '["let me check", "start over"]'"""
_APOSTROPHES = "'\u2018\u2019\u02bc\uff07"  # straight, curly left and right, modifier letter, full width


def parse_grams(text: str) -> tuple[str, ...]:
    """The grams that the config key names: a JSON array of strings or a comma-separated list; empty: the default ones.

    Raises ConfigError, naming the key, where the text is neither, or a gram holds no letter or digit.
    """
    text = " ".join(text.split())
    if not text:
        return DEFAULT_GRAMS
    return check_grams(_from_json(text) if text.startswith("[") else _from_csv(text))


def check_grams(grams: Iterable[object]) -> tuple[str, ...]:
    """The grams as given, or ConfigError where there are none or one is no phrase that could occur in a text."""
    checked = tuple(grams)
    if not checked:
        raise ConfigError(f"{_KEY}: names no gram; {_EXAMPLE}, or leave it empty for the default ones")
    for gram in checked:
        if not isinstance(gram, str) or not re.search(r"\w", gram):
            raise ConfigError(f"{_KEY}: {gram!r} is not a phrase with at least one letter or digit; {_EXAMPLE}")
    return checked  # pyright: ignore[reportReturnType]


def _from_json(text: str) -> list[object]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{_KEY}: not a JSON array: {error.msg} at character {error.pos + 1} of {text}; {_EXAMPLE}"
        ) from error


def _from_csv(text: str) -> list[str]:
    try:
        (row,) = csv.reader([text], skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise ConfigError(f"{_KEY}: not a comma-separated list: {error} in {text}; {_EXAMPLE}") from error
    return [gram.strip() for gram in row]


def compile_grams(grams: Sequence[str]) -> re.Pattern[str]:
    """One pattern for all grams: any case, whole words, any whitespace between words, any kind of apostrophe.

    Of grams that begin alike the longest is tried first, so a match covers all grams that begin where it begins.
    """
    by_length = sorted({" ".join(gram.split()) for gram in grams}, key=lambda gram: (-len(gram), gram))
    return re.compile("|".join(map(_gram_pattern, by_length)), re.IGNORECASE)


def _gram_pattern(gram: str) -> str:
    pattern = r"\s+".join(re.escape(word) for word in gram.split())
    pattern = re.sub(f"[{_APOSTROPHES}]", f"[{_APOSTROPHES}]", pattern)
    before = r"(?<!\w)" if re.match(r"\w", gram) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", gram) else ""
    return before + pattern + after


def occurrences(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Character spans of all matches, overlapping ones too: "wait let me think" holds two of the default grams."""
    match = pattern.search(text)
    while match:
        yield match.span()
        match = pattern.search(text, match.start() + 1)
