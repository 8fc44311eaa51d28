"""The nearest valid spelling of a word."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option most like `word`, or None when nothing comes close. Case, "-" and "_" do not count as differences."""
    plain = {_plain(option): option for option in options}
    found = get_close_matches(_plain(word), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else None


def did_you_mean(word: str, options: Iterable[str], form: str = '"{}"') -> str:
    """'; did you mean "option"?' for the nearest option, '' when nothing comes close."""
    found = nearest(word, options)
    return f"; did you mean {form.format(found)}?" if found is not None else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
