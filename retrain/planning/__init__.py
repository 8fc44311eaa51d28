"""Which tokens of a completion plan: `[planning] detector`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retrain.planning.offsets import TokenOffsets
from retrain.planning.regex import check_grams, compile_grams, occurrences, parse_grams
from retrain.types import ConfigError

__all__ = ["Detector", "detect", "open_detector"]

Detector = Callable[[np.ndarray], np.ndarray]
"""Token ids of one completion, int [T], to whether each token plans, bool [T]."""


def detect(
    kind: str, token_ids: Sequence[int] | np.ndarray, tokenizer: Any, grams: Sequence[str] | str | None = None
) -> np.ndarray:
    """Which tokens plan, bool [T]. The same code as in a run; for many completions open a detector once.

    kind: "regex". token_ids: one completion. tokenizer: a transformers tokenizer. grams: the phrases, as a sequence or
    written as in `[logging] strategic_grams`; None for the default ones.
    Raises ConfigError for an unusable kind or gram.
    """
    chosen = parse_grams(grams or "") if grams is None or isinstance(grams, str) else check_grams(grams)
    return _open(kind, tokenizer, chosen)(np.asarray(token_ids, dtype=np.int64))


def open_detector(kind: str, tokenizer: Any, *, grams: str = "") -> Detector:
    """The detector of `[planning] detector` = kind. grams: `[logging] strategic_grams`, "" for the default ones.

    Raises ConfigError for an unusable kind or gram.
    """
    return _open(kind, tokenizer, parse_grams(grams))


def _open(kind: str, tokenizer: Any, grams: tuple[str, ...]) -> Detector:
    if kind == "regex":
        return _regex_detector(tokenizer, grams)
    if kind == "semantic":
        raise ConfigError('planning.detector = "semantic" is not available yet; write "regex"')
    from retrain.config.suggest import did_you_mean

    hint = did_you_mean(kind, ("regex", "semantic")) or '; write "regex"'
    raise ConfigError(f'planning.detector = "{kind}" is unknown{hint}')


def _regex_detector(tokenizer: Any, grams: tuple[str, ...]) -> Detector:
    """A token plans if the characters it stands for overlap an occurrence of a gram in the decoded text."""
    pattern = compile_grams(grams)
    offsets = TokenOffsets(tokenizer)

    def detect_planning(token_ids: np.ndarray) -> np.ndarray:
        tokens = token_ids.tolist()
        text = offsets.text(tokens)
        matches = list(occurrences(pattern, text))
        if not matches:
            return np.zeros(len(tokens), dtype=bool)
        planning_chars = np.zeros(len(text), dtype=np.int64)
        for start, end in matches:
            planning_chars[start:end] = 1
        chars_before = np.append(0, np.cumsum(planning_chars))
        starts, ends = offsets.spans(tokens, text).T
        return chars_before[ends] > chars_before[starts]

    return detect_planning
