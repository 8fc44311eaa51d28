"""How completions are judged: `[reward] type`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Protocol

from retrain.types import ConfigError, Score

__all__ = ["Scorer", "open_scorer", "score"]


class Scorer(Protocol):
    """Judges responses. May hold processes or connections: close it (`contextlib.closing`) when done."""

    def score(self, responses: Sequence[str], references: Sequence[str]) -> list[Score]:
        """One score for each response. ValueError when the lengths differ."""
        ...

    def close(self) -> None: ...


def score(kind: str, responses: Sequence[str], references: Sequence[str], **options) -> list[float | None]:
    """Rewards of responses against references: floats, None where scoring failed. The same code as in a run.

    kind and options: those of `open_scorer`. Whoever scores repeatedly, or wants the reasons of failures, opens a
    scorer. Raises ConfigError for an unusable kind or option, ValueError when the lengths differ.
    """
    if len(responses) != len(references):
        raise ValueError(f"score() got {len(responses)} responses but {len(references)} references")
    with closing(open_scorer(kind, **options)) as scorer:
        return [verdict.value for verdict in scorer.score(responses, references)]


def open_scorer(kind: str, *, workers: int = 0, timeout_s: float = 10.0) -> Scorer:
    """The scorer of `[reward] type` = kind.

    workers: processes of the `math` reward; 0 means one for each core, four at most. They start when first needed.
    timeout_s: seconds that one comparison may take; one that takes longer is stopped and is an error, not a 0.
    Raises ConfigError for an unusable kind or option.
    """
    if workers < 0:
        raise ConfigError(f"workers = {workers}: give the number of worker processes, or 0 for one per core")
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s = {timeout_s}: give a number of seconds above 0")
    match kind:
        case "match":
            from retrain.reward.match import MatchScorer

            return MatchScorer()
        case "math":
            from retrain.reward.math import MathScorer

            return MathScorer(workers=workers, timeout_s=timeout_s)
        case "judge" | "custom":
            raise ConfigError(f'reward.type = "{kind}" is not available yet; write "match" or "math"')
    from retrain.config.suggest import did_you_mean

    hint = did_you_mean(kind, ("match", "math", "judge", "custom")) or '; write "match" or "math"'
    raise ConfigError(f'reward.type = "{kind}" is unknown{hint}')
