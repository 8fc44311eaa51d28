"""credit.jsonl: a few completions of each step, token by token, so that a person can see where the credit went."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from retrain.planning.offsets import TokenOffsets
from retrain.training.batching import Credited
from retrain.types import Group, StepResult

CreditRows = Callable[[int, Sequence[Group], Credited, StepResult], list[dict[str, Any]]]
"""(step, groups, what became of them, what the learner reports) to the lines of credit.jsonl."""


def no_credit_rows(step: int, groups: Sequence[Group], credited: Credited, learned: StepResult) -> list[dict[str, Any]]:
    return []


def open_credit_rows(tokenizer: Any, samples: int) -> CreditRows:
    """Lines for `samples` completions a step; none for a step without training.

    A line has the texts of the completion's tokens, and for each its advantage and uncertainty to four significant
    digits, null for a token that an environment wrote. planning: positions of the tokens that plan.
    """
    if not samples:
        return no_credit_rows
    offsets = TokenOffsets(tokenizer)

    def rows(step: int, groups: Sequence[Group], credited: Credited, learned: StepResult) -> list[dict[str, Any]]:
        if not learned.credit:
            return []
        chosen = choose(credited.members, [group.rewards_G for group in groups], samples)
        return [_row(step, groups, credited, learned, place, offsets) for place in chosen]

    return rows


def choose(members: Sequence[tuple[int, int]], rewards: Sequence[Sequence[float | None]], count: int) -> list[int]:
    """Positions in `members`, (group, completion) pairs, of the `count` most telling completions.

    Best and worst of the first group whose rewards differ, then of the next; after these the best of the groups whose
    rewards are equal. Among equals the first.
    """
    by_group: dict[int, list[int]] = {}
    for place, (group, _) in enumerate(members):
        by_group.setdefault(group, []).append(place)

    def reward(place: int) -> float:
        group, completion = members[place]
        return rewards[group][completion] or 0.0

    ends = [(max(places, key=reward), min(places, key=reward)) for places in by_group.values()]
    telling = [place for pair in ends if reward(pair[0]) != reward(pair[1]) for place in pair]
    return [*telling, *(best for best, worst in ends if reward(best) == reward(worst))][:count]


def token_texts(tokens: list[int], offsets: TokenOffsets) -> list[str]:
    """The text of each token. What they share, a character of several tokens, is the first one's; a special token,
    which is left out of the decoded text, goes by its name. Without these, they join to that text."""
    text = offsets.text(tokens)
    return list(_texts(tokens, text, offsets))


def _texts(tokens: list[int], text: str, offsets: TokenOffsets) -> Iterator[str]:
    shown = 0
    for token, (start, end) in zip(tokens, offsets.spans(tokens, text).tolist(), strict=True):
        yield text[max(shown, start) : end] if end > start else offsets.name(token)
        shown = max(shown, end)


def _row(
    step: int, groups: Sequence[Group], credited: Credited, learned: StepResult, place: int, offsets: TokenOffsets
) -> dict[str, Any]:
    (p, g), rollout = credited.members[place], credited.batch.rollouts[place]
    advantages, uncertainty = learned.credit[place]
    sampled = np.ones(len(rollout.tokens_T), dtype=bool) if rollout.sampled_T is None else rollout.sampled_T
    group = groups[p]
    return {
        "step": step,
        "prompt_index": group.index,
        "completion_index": g,
        "prompt": group.example.prompt,
        "reference": group.example.reference,
        "reward": group.rewards_G[g],
        "advantage": rollout.advantage,
        "finish_reason": group.completions[g].finish_reason,
        "sepa_lambda": credited.batch.sepa_lambda,
        "tokens": token_texts(rollout.tokens_T.tolist(), offsets),
        "advantages": _at(sampled, advantages),
        "uncertainty": _at(sampled, uncertainty),
        "planning": np.flatnonzero(rollout.planning_T & sampled).tolist(),
    }


def _at(sampled: np.ndarray, values: np.ndarray) -> list[float | None]:
    """values, of the sampled tokens only, at their places among all tokens."""
    rounded = (float(f"{value:.4g}") for value in values.tolist())
    return [next(rounded) if own else None for own in sampled.tolist()]
