"""How completions are judged: `[reward] type`, or a weighted list of rewards in `[[reward.parts]]`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Protocol

from retrain.types import ConfigError, Score

if TYPE_CHECKING:
    from retrain.config.rewards import RewardConfig, RewardKeys

__all__ = ["Scorer", "open_rewards", "open_scorer", "score"]


class Scorer(Protocol):
    """Judges responses. May hold processes or connections: close it (`contextlib.closing`) when done."""

    def score(
        self, responses: Sequence[str], references: Sequence[str], prompts: Sequence[str] | None = None
    ) -> list[Score]:
        """One score for each response. ValueError when the lengths differ.

        prompts: the problems' text, for a reward that looks at it (`judge`).
        """
        ...

    def figures(self) -> dict[str, float | None]:
        """What the work since the last call took, by the names of metrics.jsonl; always the same names, or none."""
        ...

    def close(self) -> None: ...


def score(kind: str, responses: Sequence[str], references: Sequence[str], **options) -> list[float | None]:
    """Rewards of responses against references: floats, None where scoring failed. The same code as in a run.

    kind and options: those of `open_scorer`. Whoever scores repeatedly, wants the reasons of failures or a judge that
    sees the prompts, opens a scorer. Raises ConfigError for an unusable kind or option, ValueError when the lengths
    differ.
    """
    if len(responses) != len(references):
        raise ValueError(f"score() got {len(responses)} responses but {len(references)} references")
    with closing(open_scorer(kind, **options)) as scorer:
        return [verdict.value for verdict in scorer.score(responses, references)]


def open_scorer(kind: str, *, workers: int = 0, **keys) -> Scorer:
    """The scorer of `[reward] type` = kind.

    workers: processes of the `math` reward; 0 means one for each core, four at most. They start when first needed.
    keys: other keys of `[reward]`, such as timeout_s or judge_model; those left out have their defaults.
    Raises ConfigError for an unusable kind or key.
    """
    from retrain.config import build

    if workers < 0:
        raise ConfigError(f"workers = {workers}: give the number of worker processes, or 0 for one per core")
    return _open(build({"reward": {"type": kind, **keys}}).reward, workers)


def open_rewards(section: RewardConfig, source: str = "") -> Scorer:
    """The scorer of a run: that of `[reward] type`, or the weighted sum of `[[reward.parts]]`.

    source: the `[data] source`; the tasks of Reasoning Gym bring their own scorers.
    Raises ConfigError for what cannot be loaded or is refused, RetrainError where a judge does not answer: it is asked
    once here, before a run writes anything.
    """
    from retrain.config.fields import source_kind
    from retrain.reward.judge import JudgeScorer
    from retrain.reward.parts import PartsScorer

    if source_kind(source) == "reasoning_gym":
        from retrain.reward.reasoning_gym import ReasoningGymScorer

        return ReasoningGymScorer(timeout_s=section.timeout_s)
    with ExitStack() as opened:
        scorers = []
        for keys in section.parts or (section,):
            scorer = _open(keys)
            opened.callback(scorer.close)
            if isinstance(scorer, JudgeScorer):
                scorer.check()
            scorers.append(scorer)
        opened.pop_all()
    if not section.parts:
        return scorers[0]
    return PartsScorer([(p.label, p.weight, scorer) for p, scorer in zip(section.parts, scorers, strict=True)])


def _open(keys: RewardKeys, workers: int = 0) -> Scorer:
    match keys.type:
        case "match":
            from retrain.reward.match import MatchScorer

            return MatchScorer()
        case "math":
            from retrain.reward.math import MathScorer

            return MathScorer(workers=workers, timeout_s=keys.timeout_s)
        case "judge":
            from retrain.reward.judge import JudgeScorer

            return JudgeScorer(keys)
        case "custom":
            from retrain.reward.custom import CustomScorer

            return CustomScorer(keys)
