"""The semantic detector: which windows of a text mean planning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from retrain.planning.anchors import EXECUTION, PLANNING
from retrain.planning.encoder import Embed
from retrain.planning.windows import as_embedded, windows

CACHED_WINDOWS = 100_000

Score = Callable[[Sequence[str]], list[float]]
"""Windows, as they stand in the text, to how much more they resemble planning than execution, in [-2, 2]."""


def planning_scores(embed: Embed, *, cached: int = CACHED_WINDOWS) -> Score:
    """Cosine similarity to the centroid of the planning anchors minus that to the centroid of the execution ones.

    A window without a letter scores -2, the least. The scores of the last `cached` windows that were new are kept.
    """
    direction = _centroid(embed(PLANNING)) - _centroid(embed(EXECUTION))
    cache: dict[str, float] = {}

    def score(found: Sequence[str]) -> list[float]:
        keys = [as_embedded(window) for window in found]
        new = sorted(set(keys) - cache.keys() - {""})
        if new:
            cache.update(zip(new, (embed(new) @ direction).tolist(), strict=True))
        scores = [cache[key] if key else -2.0 for key in keys]
        for oldest in list(islice(cache, max(len(cache) - cached, 0))):
            del cache[oldest]
        return scores

    return score


def planning_spans(texts: Sequence[str], score: Score, threshold: float) -> list[list[tuple[int, int]]]:
    """Of each text, the character spans of the windows that score above the threshold."""
    found = [windows(text) for text in texts]
    scores = iter(score([text[a:b] for text, spans in zip(texts, found, strict=True) for a, b in spans]))
    return [[span for span in spans if next(scores) > threshold] for spans in found]


def _centroid(embeddings: np.ndarray) -> np.ndarray:
    mean = embeddings.mean(axis=0)
    return mean / np.linalg.norm(mean)
