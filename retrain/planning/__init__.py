"""Which tokens of a completion plan: `[planning] detector`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retrain.config import PlanningConfig
from retrain.config.suggest import did_you_mean
from retrain.planning.offsets import TokenOffsets, overlapping
from retrain.planning.regex import check_grams, compile_grams, occurrences, parse_grams
from retrain.types import ConfigError

__all__ = ["Detector", "detect", "open_detector"]

Detector = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""Token ids of some completions, int [T] each, to whether each token plans, bool [T] each."""

FindSpans = Callable[[Sequence[str]], list[list[tuple[int, int]]]]
"""Texts to the character spans in each that plan."""


def detect(
    kind: str,
    token_ids: Sequence[int] | np.ndarray,
    tokenizer: Any,
    grams: Sequence[str] | str | None = None,
    *,
    model: str = "",
    threshold: float | None = None,
) -> np.ndarray:
    """Which tokens plan, bool [T]. The same code as in a run; for many completions open a detector once.

    kind: "regex" or "semantic". token_ids: one completion. tokenizer: a transformers tokenizer. grams: the phrases of
    "regex", as a sequence or written as in `[logging] strategic_grams`; None for the default ones. model, threshold:
    those of "semantic", as in `[planning]`.
    Raises ConfigError for an unusable kind, gram or model, or a missing package.
    """
    chosen = parse_grams(grams or "") if grams is None or isinstance(grams, str) else check_grams(grams)
    detector = _open(kind, tokenizer, chosen, model, threshold, "cpu")
    return detector([np.asarray(token_ids, dtype=np.int64)])[0]


def open_detector(
    kind: str,
    tokenizer: Any,
    *,
    grams: str = "",
    model: str = "",
    threshold: float | None = None,
    device: str = "cpu",
) -> Detector:
    """The detector of `[planning] detector` = kind, made for many completions.

    grams: `[logging] strategic_grams`, "" for the default ones. model, threshold: as in `[planning]`, "" and None for
    the defaults. device: torch device of the semantic detector's encoder.
    Raises ConfigError for an unusable kind, gram or model, or a missing package.
    """
    return _open(kind, tokenizer, parse_grams(grams), model, threshold, device)


def _open(
    kind: str, tokenizer: Any, grams: tuple[str, ...], model: str, threshold: float | None, device: str
) -> Detector:
    if kind == "regex":
        return _on_tokens(tokenizer, _gram_spans(grams))
    if kind == "semantic":
        defaults = PlanningConfig()
        margin = defaults.threshold if threshold is None else threshold
        return _on_tokens(tokenizer, _semantic_spans(model or defaults.model, margin, device))
    hint = did_you_mean(kind, ("regex", "semantic")) or '; write "regex"'
    raise ConfigError(f'planning.detector = "{kind}" is unknown{hint}')


def _gram_spans(grams: tuple[str, ...]) -> FindSpans:
    pattern = compile_grams(grams)
    return lambda texts: [list(occurrences(pattern, text)) for text in texts]


def _semantic_spans(model: str, threshold: float, device: str) -> FindSpans:
    from retrain.planning.encoder import open_encoder
    from retrain.planning.semantic import planning_scores, planning_spans

    score = planning_scores(open_encoder(model, device))
    return lambda texts: planning_spans(texts, score, threshold)


def _on_tokens(tokenizer: Any, find_spans: FindSpans) -> Detector:
    """A token plans if the characters it stands for overlap a span of the decoded text that plans."""
    offsets = TokenOffsets(tokenizer)

    def detect_planning(completions: Sequence[np.ndarray]) -> list[np.ndarray]:
        token_lists = [token_ids.tolist() for token_ids in completions]
        texts = [offsets.text(tokens) for tokens in token_lists]
        return [
            overlapping(offsets.spans(tokens, text), spans) if spans else np.zeros(len(tokens), dtype=bool)
            for tokens, text, spans in zip(token_lists, texts, find_spans(texts), strict=True)
        ]

    return detect_planning
