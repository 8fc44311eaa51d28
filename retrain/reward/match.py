"""The `match` reward: the boxed answer is the reference, character for character."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.boxed import last_box
from retrain.types import Score


class MatchScorer:
    """1.0 where the content of the last box equals the reference, both trimmed; else 0.0. Never fails."""

    def score(
        self, responses: Sequence[str], references: Sequence[str], prompts: Sequence[str] | None = None
    ) -> list[Score]:
        return [
            Score(float(last_box(response) == reference.strip()))
            for response, reference in zip(responses, references, strict=True)
        ]

    def figures(self) -> dict[str, float | None]:
        return {}

    def close(self) -> None:
        """Nothing is held."""
