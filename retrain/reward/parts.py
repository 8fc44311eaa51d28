"""Several rewards at once: the weighted sum of `[[reward.parts]]`."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.reward import Scorer
from retrain.types import Score


class PartsScorer:
    """The sum of weight * value over parts (name, weight, scorer); the values stay visible in `Score.parts`.

    A response that one part cannot judge has no sum: its score is an error that names the part, never a partial sum.
    """

    def __init__(self, parts: Sequence[tuple[str, float, Scorer]]) -> None:
        self._parts = parts

    def score(
        self, responses: Sequence[str], references: Sequence[str], prompts: Sequence[str] | None = None
    ) -> list[Score]:
        columns = [scorer.score(responses, references, prompts) for _, _, scorer in self._parts]
        return [self._sum(verdicts) for verdicts in zip(*columns, strict=True)]

    def figures(self) -> dict[str, float | None]:
        """Of all parts. A second judge's have its part's name at the end."""
        merged: dict[str, float | None] = {}
        for name, _, scorer in self._parts:
            for key, value in scorer.figures().items():
                merged[f"{key}_{name}" if key in merged else key] = value
        return merged

    def close(self) -> None:
        for _, _, scorer in self._parts:
            scorer.close()

    def _sum(self, verdicts: Sequence[Score]) -> Score:
        values = tuple((name, verdict.value) for (name, _, _), verdict in zip(self._parts, verdicts, strict=True))
        errors = [f"{n}: {v.error}" for (n, _, _), v in zip(self._parts, verdicts, strict=True) if v.value is None]
        if errors:
            return Score(None, "; ".join(errors), values)
        total = sum(w * v.value for (_, w, _), v in zip(self._parts, verdicts, strict=True) if v.value is not None)
        return Score(total, parts=values)
