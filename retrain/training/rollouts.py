"""Prompts to judged completions, whoever writes the prompts: a dataset and a reward, or an environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from retrain.environment import Environment, Outcome, Problem, Start, Turn
from retrain.inference import Engine
from retrain.reward import Scorer
from retrain.training.stopwatch import Stopwatch
from retrain.types import Completion, Example, RetrainError


class Rollouts(Protocol):
    """examples: what may be asked. prompt_tokens: int64 ids of each, its group's prompt."""

    @property
    def examples(self) -> Sequence[Example]: ...

    @property
    def prompt_tokens(self) -> Sequence[np.ndarray]: ...

    def groups(
        self, places: Sequence[int], streams_PG: np.ndarray, *, temperature: float, watch: Stopwatch
    ) -> list[list[Outcome]]:
        """G judged completions (fewer where a server's text could not be used) for each of P places in `examples`.

        streams_PG: uint64, one for each completion. watch: takes the time of the stages "sample" and "reward".
        """
        ...

    def figures(self) -> dict[str, float | None]:
        """What judging took since the last call, as `Scorer.figures` names it."""
        ...


@dataclass(frozen=True)
class Answers:
    """Rollouts of one turn: the engine answers a dataset's prompts, a scorer judges."""

    examples: Sequence[Example]
    prompt_tokens: Sequence[np.ndarray]
    engine: Engine
    scorer: Scorer
    max_tokens: int

    def groups(
        self, places: Sequence[int], streams_PG: np.ndarray, *, temperature: float, watch: Stopwatch
    ) -> list[list[Outcome]]:
        prompts = [self.prompt_tokens[place] for place in places]
        with watch("sample"):
            answers = self.engine.generate(prompts, streams_PG, max_tokens=self.max_tokens, temperature=temperature)
        pairs = [
            (completion.text, self.examples[place])
            for place, group in zip(places, answers, strict=True)
            for completion in group
        ]
        texts, references = [text for text, _ in pairs], [example.reference for _, example in pairs]
        with watch("reward"):
            scores = iter(self.scorer.score(texts, references, [example.prompt for _, example in pairs]))
        return [[Outcome(completion, next(scores)) for completion in group] for group in answers]

    def figures(self) -> dict[str, float | None]:
        return self.scorer.figures()


class Episodes:
    """Rollouts that an environment plays and judges; the engine samples the model's turns."""

    def __init__(self, problems: Sequence[Problem], environment: Environment, engine: Engine, max_tokens: int) -> None:
        self.problems, self.environment, self.engine, self.max_tokens = problems, environment, engine, max_tokens
        # Asked for once a prompt: made once, however many problems there are.
        self.examples: Sequence[Example] = [problem.example for problem in problems]
        self.prompt_tokens: Sequence[np.ndarray] = [problem.prompt_T for problem in problems]

    def groups(
        self, places: Sequence[int], streams_PG: np.ndarray, *, temperature: float, watch: Stopwatch
    ) -> list[list[Outcome]]:
        starts = [
            [Start(self.problems[place], int(stream)) for stream in streams]
            for place, streams in zip(places, streams_PG, strict=True)
        ]

        def sample(turns: Sequence[Turn]) -> list[Completion]:
            return sample_turns(self.engine, turns, temperature=temperature)

        with watch("sample"):
            return self.environment.play(starts, sample, max_tokens=self.max_tokens)

    def figures(self) -> dict[str, float | None]:
        return {}


def sample_turns(engine: Engine, turns: Sequence[Turn], *, temperature: float) -> list[Completion]:
    """One completion for each turn; turns after the same ids share their prompt's computation.

    Raises RetrainError where the engine leaves one out.
    """
    by_context: dict[bytes, list[int]] = {}
    for index, turn in enumerate(turns):
        by_context.setdefault(turn.context_T.tobytes(), []).append(index)
    by_size: dict[int, list[list[int]]] = {}
    for indices in by_context.values():
        by_size.setdefault(len(indices), []).append(indices)
    found: dict[int, Completion] = {}
    for members in by_size.values():
        answers = engine.generate(
            [turns[indices[0]].context_T for indices in members],
            np.array([[turns[i].stream for i in indices] for indices in members], dtype=np.uint64),
            max_tokens=max(turns[i].max_tokens for indices in members for i in indices),
            temperature=temperature,
        )
        for indices, group in zip(members, answers, strict=True):
            if len(group) < len(indices):
                raise RetrainError(
                    "a turn of an episode was left out: this server's text does not tell its tokens. Use an engine "
                    'that returns token ids ("vllm" or "sglang")'
                )
            found |= zip(indices, group, strict=True)
    return [cut(found[index], turn.max_tokens) for index, turn in enumerate(turns)]


def cut(completion: Completion, limit: int) -> Completion:
    """Its first `limit` tokens: what the same stream samples where no more are allowed."""
    if len(completion.tokens_T) <= limit:
        return completion
    return replace(
        completion,
        tokens_T=completion.tokens_T[:limit],
        logprobs_T=completion.logprobs_T[:limit],
        finish_reason="length",
    )
